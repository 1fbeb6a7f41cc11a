"""An application: updates random documents at a rate until its input ends; then prints how many a second it made.

    load_updates.py URI DATABASE.COLLECTION DOCUMENTS RATE

The `_id`s are 0 to DOCUMENTS - 1. What is refused is tried again, as an application does.
"""

import random
import sys
import threading
import time

import pymongo
from pymongo.errors import PyMongoError

THREADS = 8
uri, namespace, documents, rate = sys.argv[1:]
database, _, name = namespace.partition(".")
collection = pymongo.MongoClient(uri, maxPoolSize=THREADS, w="majority")[database][name]
stop = threading.Event()
made = [0] * THREADS


def write(thread):
    pause, due = THREADS / float(rate), time.monotonic()
    while not stop.is_set():
        update_once(random.randrange(int(documents)))
        made[thread] += 1
        due += pause
        if due > time.monotonic():
            time.sleep(due - time.monotonic())


def update_once(number):
    while not stop.is_set():
        try:
            collection.update_one({"_id": number}, {"$inc": {"updates": 1}})
            return
        except PyMongoError:
            time.sleep(0.002)


begun = time.monotonic()
threads = [threading.Thread(target=write, args=(number,)) for number in range(THREADS)]
for thread in threads:
    thread.start()
print("writing", flush=True)
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
print(sum(made) / (time.monotonic() - begun))

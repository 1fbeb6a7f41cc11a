"""The script that is written first: a pool of 100 threads, one GET and one update per document.

    backfill_threads.py URI DATABASE.COLLECTION API
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import local

import pymongo
import requests

THREADS = 100
uri, namespace, api = sys.argv[1:]
database, _, name = namespace.partition(".")
collection = pymongo.MongoClient(uri, maxPoolSize=THREADS)[database][name]
secondary = collection.with_options(read_preference=pymongo.ReadPreference.SECONDARY_PREFERRED)
of_thread = local()


def fill(document):
    if not hasattr(of_thread, "session"):
        of_thread.session = requests.Session()
        of_thread.session.trust_env = False
    answer = of_thread.session.get(f"{api}{document['legacyKey']}", timeout=5)
    answer.raise_for_status()
    collection.update_one({"_id": document["_id"]}, {"$set": {"newKey": answer.json()["newKey"]}})


with ThreadPoolExecutor(THREADS) as pool:
    candidates = secondary.find({"newKey": None, "newKeyFlag": None}, {"legacyKey": 1})
    filled = sum(1 for _ in pool.map(fill, candidates))
print(filled)

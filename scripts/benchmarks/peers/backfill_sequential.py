"""The loop without any concurrency: one GET and one update after the other.

    backfill_sequential.py URI DATABASE.COLLECTION API
"""

import sys

import pymongo
import requests

uri, namespace, api = sys.argv[1:]
database, _, name = namespace.partition(".")
collection = pymongo.MongoClient(uri)[database][name]
session = requests.Session()
session.trust_env = False
filled = 0
for document in collection.find({"newKey": None, "newKeyFlag": None}, {"legacyKey": 1}):
    answer = session.get(f"{api}{document['legacyKey']}", timeout=5)
    answer.raise_for_status()
    collection.update_one({"_id": document["_id"]}, {"$set": {"newKey": answer.json()["newKey"]}})
    filled += 1
print(filled)

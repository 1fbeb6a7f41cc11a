"""Copies what a filter finds by reading and inserting, raw, 1,000 documents at a time.

    read_and_insert.py URI DATABASE.COLLECTION TARGET FILTER
"""

import json
import sys

import pymongo
from bson.raw_bson import RawBSONDocument

uri, namespace, target, keep = sys.argv[1:]
database, _, name = namespace.partition(".")
client = pymongo.MongoClient(uri, document_class=RawBSONDocument, w="majority")
source, copy = client[database][name], client[database][target]
batch = []
for document in source.find(json.loads(keep), batch_size=1000):
    batch.append(document)
    if len(batch) == 1000:
        copy.insert_many(batch, ordered=False)
        batch = []
if batch:
    copy.insert_many(batch, ordered=False)

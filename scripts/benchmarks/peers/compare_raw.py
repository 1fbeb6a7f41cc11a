"""Compares two collections byte for byte: both read raw and sorted by `_id`, side by side.

    compare_raw.py URI DATABASE.COLLECTION TARGET

Prints how many documents are equal and how many are not; the `_id`s are of one type.
"""

import sys

import pymongo
from bson.raw_bson import RawBSONDocument

uri, namespace, target = sys.argv[1:]
database, _, name = namespace.partition(".")
client = pymongo.MongoClient(uri, document_class=RawBSONDocument)


def documents(collection):
    cursor = client[database][collection].with_options(read_concern=pymongo.read_concern.ReadConcern("majority"))
    yield from cursor.find(sort=[("_id", 1)], batch_size=1000)


equal = different = 0
left, right = documents(name), documents(target)
one, other = next(left, None), next(right, None)
while one is not None or other is not None:
    if one is not None and other is not None and one.raw == other.raw:
        equal += 1
        one, other = next(left, None), next(right, None)
        continue
    different += 1
    if other is None or (one is not None and one["_id"] <= other["_id"]):
        is_pair = other is not None and one["_id"] == other["_id"]
        one = next(left, None)
        other = next(right, None) if is_pair else other
    else:
        other = next(right, None)
print(equal, different)

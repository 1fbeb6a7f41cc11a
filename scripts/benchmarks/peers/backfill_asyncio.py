"""The script as a good engineer writes it: asyncio, 100 calls in flight, guarded bulk writes.

    backfill_asyncio.py URI DATABASE.COLLECTION API
"""

import asyncio
import sys

import aiohttp
from pymongo import AsyncMongoClient, ReadPreference, UpdateOne

CALLS = 100
BATCH = 1000
uri, namespace, api = sys.argv[1:]
database, _, name = namespace.partition(".")


async def main():
    client = AsyncMongoClient(uri, w="majority")
    collection = client[database][name]
    documents, answers = asyncio.Queue(BATCH), asyncio.Queue(BATCH)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CALLS)) as session:
        writer = asyncio.create_task(write(collection, answers))
        callers = [asyncio.create_task(call(session, documents, answers)) for _ in range(CALLS)]
        secondary = collection.with_options(read_preference=ReadPreference.SECONDARY_PREFERRED)
        async for document in secondary.find({"newKey": None, "newKeyFlag": None}, {"legacyKey": 1}):
            await documents.put(document)
        for _ in callers:
            await documents.put(None)
        await asyncio.gather(*callers)
        await answers.put(None)
        print(await writer)
    await client.close()


async def call(session, documents, answers):
    while (document := await documents.get()) is not None:
        async with session.get(f"{api}{document['legacyKey']}") as response:
            response.raise_for_status()
            answer = await response.json()
        guard = {"_id": document["_id"], "newKey": None, "newKeyFlag": None}
        await answers.put(UpdateOne(guard, {"$set": {"newKey": answer["newKey"]}}))


async def write(collection, answers):
    filled, batch = 0, []
    while (update := await answers.get()) is not None:
        batch.append(update)
        if len(batch) == BATCH:
            filled += (await collection.bulk_write(batch, ordered=False)).modified_count
            batch = []
    if batch:
        filled += (await collection.bulk_write(batch, ordered=False)).modified_count
    return filled


asyncio.run(main())

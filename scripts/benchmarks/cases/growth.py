"""What a collection's size costs: time per document, keys examined per chunk, memory."""

from ..measure import Case
from .backfill import COLLECTION, NO_LIMIT, prepare
from . import cleanse

CHUNK = 1000


def growth(bench, sizes):
    """Backfills the last part of collections of several sizes, and copies and compares each whole."""
    case = Case("growth", "per size of the collection: backfill of 10,000 documents, whole copy, whole comparison")
    for size in sizes:
        name = f"{size:,}"
        prepare(bench, size)
        for place, after in (("first", 0), ("last", size - CHUNK)):
            case.add(f"{place} chunk at {name}", "keys examined/document", examined(bench, after))
        with bench.key_api() as api:
            config = bench.backfill_config(COLLECTION, api, False)
            _, seconds, peak = bench.ours("backfill", "--tps", NO_LIMIT, "--limit", "10000", config=config)
        case.add(f"backfill at {name}", "µs/document", seconds * 1e6 / min(size, 10_000))
        case.add(f"backfill at {name}: memory", "MiB", peak)
        bench.seed(cleanse.SOURCE, size)
        bench.forget()
        bench.database.copied.drop()
        _, seconds, peak = cleanse.cleanse(bench)
        case.add(f"copy of {name}", "µs/document", seconds * 1e6 / size)
        case.add(f"copy of {name}: memory", "MiB", peak)
        seconds, peak = cleanse.verify_all(bench)
        case.add(f"comparison of {name}", "µs/document", seconds * 1e6 / size)
        case.add(f"comparison of {name}: memory", "MiB", peak)
    memory = [value for side in case.sides if side.unit == "MiB" for value in side.values]
    case.judge("peak of memory in MiB", [max(memory)], False, 64)
    keys = [value for side in case.sides if "keys" in side.unit for value in side.values]
    case.judge("keys examined per document", [max(keys)], False, 1.0)
    return case


def examined(bench, after):
    """Keys examined per document of the chunk that begins at an `_id`, by the server's own explain."""
    collection = bench.database[COLLECTION]
    find = {
        "find": COLLECTION,
        "filter": {"newKey": None, "newKeyFlag": None, "$expr": {"$gt": ["$_id", {"$literal": after - 1}]}},
        "sort": {"_id": 1}, "limit": CHUNK,
        "hint": next(name for name in collection.index_information() if name.startswith("mongorekey_")),
    }
    stats = bench.database.command("explain", find, verbosity="executionStats")["executionStats"]
    assert stats["nReturned"] == CHUNK, f"a chunk of {stats['nReturned']} documents"
    return stats["totalKeysExamined"] / CHUNK

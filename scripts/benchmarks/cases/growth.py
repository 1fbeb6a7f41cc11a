"""What a collection's size costs: time per document, keys examined per chunk, memory."""

from ..measure import Case
from .backfill import NO_LIMIT, index
from .cleanse import SOURCE, cleanse, verify_all

CHUNK = 1000
SIZES = (10_000, 100_000, 1_000_000, 4_000_000)


def growth(bench):
    """Backfills a part of collections of several sizes, and copies and compares each whole."""
    case = Case("growth", "per size of the collection: backfill of 10,000 documents, whole copy, whole comparison")
    for size in SIZES:
        name = f"{size:,}"
        bench.forget()
        bench.seed(SOURCE, size)
        index(bench, SOURCE)
        for place, after in (("first", 0), ("last", size - CHUNK)):
            case.add(f"{place} chunk at {name}", "keys examined/document", examined(bench, after))
        with bench.key_api() as api:
            config = bench.backfill_config(SOURCE, api, False)
            _, seconds, peak = bench.ours("backfill", "--tps", NO_LIMIT, "--limit", "10000", config=config)
        case.add(f"backfill at {name}", "µs/document", seconds * 1e6 / min(size, 10_000))
        case.add(f"backfill at {name}: memory", "MiB", peak)
        # A copy has the indexes of its source; what they cost is not what is asked here.
        bench.database[SOURCE].drop_indexes()
        bench.database.copied.drop()
        _, seconds, peak = cleanse(bench)
        case.add(f"copy of {name}", "µs/document", seconds * 1e6 / size)
        case.add(f"copy of {name}: memory", "MiB", peak)
        seconds, peak = verify_all(bench)
        case.add(f"comparison of {name}", "µs/document", seconds * 1e6 / size)
        case.add(f"comparison of {name}: memory", "MiB", peak)
    memory = [value for side in case.sides if side.unit == "MiB" for value in side.values]
    case.judge("peak of memory in MiB", [max(memory)], False, 64)
    keys = [value for side in case.sides if "keys" in side.unit for value in side.values]
    case.judge("keys examined per document", [max(keys)], False, 1.0)
    return case


def examined(bench, after):
    """Keys examined per document of the chunk that begins at an `_id`, by the server's own explain."""
    collection = bench.database[SOURCE]
    find = {
        "find": SOURCE,
        "filter": {"newKey": None, "newKeyFlag": None, "$expr": {"$gt": ["$_id", {"$literal": after - 1}]}},
        "sort": {"_id": 1}, "limit": CHUNK,
        "hint": next(name for name in collection.index_information() if name.startswith("mongorekey_")),
    }
    stats = bench.database.command("explain", find, verbosity="executionStats")["executionStats"]
    assert stats["nReturned"] == CHUNK, f"a chunk of {stats['nReturned']} documents"
    return stats["totalKeysExamined"] / CHUNK

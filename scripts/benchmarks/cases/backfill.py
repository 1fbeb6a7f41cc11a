"""Backfills without a limit, under a limit, and with many documents per key."""

import bisect
import json
import math
import tempfile
from pathlib import Path

from ..measure import DATABASE, Case

NO_LIMIT = "1000000"
COLLECTION = "candidates"


def unlimited(bench, rounds):
    """Against the scripts people write, and against the same work without bookkeeping."""
    case = Case("backfill", "documents/s, key API without latency, no TPS limit; whole processes, start included")
    documents, slow = 50_000 * bench.size, 10_000 * bench.size
    prepare(bench, documents)
    with bench.key_api() as api:

        def fill(name, count, run):
            restore(bench, count)
            seconds = run()
            left = bench.database[COLLECTION].count_documents({"newKey": None})
            assert left == 0, f"{name} left {left} documents"
            case.add(name, "documents/s", count / seconds)

        def ours(key_map):
            config = bench.backfill_config(COLLECTION, api, key_map)
            return bench.ours("backfill", "--tps", NO_LIMIT, config=config)[1]

        bench.rounds(rounds, [
            lambda: fill("threads", slow, lambda: bench.peer("backfill_threads.py", NAMESPACE, api)[1]),
            lambda: fill("asyncio", documents, lambda: bench.peer("backfill_asyncio.py", NAMESPACE, api)[1]),
            lambda: fill("mongorekey", documents, lambda: ours(False)),
            lambda: fill("mongorekey, key map", documents, lambda: ours(True)),
            lambda: fill("bare pipeline", documents, lambda: bare(bench, api)),
        ])
    case.compare("mongorekey", "threads", True, 20)
    case.compare("mongorekey", "asyncio", True, 2)
    case.compare("mongorekey", "bare pipeline", True, 0.85)
    case.compare("mongorekey, key map", "bare pipeline", True, 0.60)
    # How far ahead of the scripts anybody can be here who makes the same calls and updates.
    case.compare("bare pipeline", "threads", True)
    case.compare("bare pipeline", "asyncio", True)
    return case


NAMESPACE = f"{DATABASE}.{COLLECTION}"


def bare(bench, api):
    from ..measure import timed
    return timed([bench.pipeline, "--uri", bench.uri, "--collection", NAMESPACE, "--api", api])[1]


def prepare(bench, count, per_key=1):
    """Seeds, and the partial index: the scripts may use it too."""
    bench.forget()
    bench.seed("candidates_seed", count, per_key)
    restore(bench, count)
    index(bench, COLLECTION)


def index(bench, collection):
    bench.ours("index", "create", config=bench.backfill_config(collection, "http://127.0.0.1:1/", True))


def restore(bench, count):
    """The candidates as they were; `$out` keeps the indexes."""
    bench.forget()
    bench.database.candidates_seed.aggregate([{"$match": {"_id": {"$lt": count}}}, {"$out": COLLECTION}])


def limited(bench, rounds):
    """How much of the allowed calls is used, and whether the ceiling holds."""
    case = Case("backfill under TPS", "share of the allowed calls that is used; 300 ms latency, 1% of calls 2 s")
    for tps, seconds in ((10, 20), (100, 15), (1000, 10)):
        prepare(bench, tps * seconds)
        used = []
        for _ in range(rounds):
            times = arrivals(bench, tps)
            span = times[-1] - times[0]
            used.append((len(times) - 1) / (tps * span))
            most, allowed = busiest_second(times), tps + max(1, tps // 100)
            assert most <= allowed, f"{most} calls in a second at {tps} TPS"
            case.add(f"{tps} TPS", "of the allowed calls", used[-1])
            restore(bench, tps * seconds)
        case.judge(f"{tps} TPS: share used", used, True, 0.99)
    return case


def arrivals(bench, tps):
    """When each call arrived, in seconds, in order."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "calls.jsonl"
        slow = ["--latency", "300ms", "--slow-share", "1%", "--slow-latency", "2s", "--log", str(log)]
        with bench.key_api(*slow) as api:
            bench.ours("backfill", "--tps", str(tps), config=bench.backfill_config(COLLECTION, api, False))
        return sorted(json.loads(line)["since_start_us"] / 1e6 for line in log.read_text().splitlines())


def busiest_second(times):
    return max(bisect.bisect_left(times, begin + 1) - index for index, begin in enumerate(times))


def concurrency(bench, rounds):
    """10,000 records, 50 ms per call: one after the other against 50 calls in flight."""
    case = Case("backfill by concurrency", "documents/s, 50 ms latency; 50 calls in flight against one after the other")
    many, few = 10_000, 200
    prepare(bench, many)
    with bench.key_api("--latency", "50ms") as api:
        for _ in range(rounds):
            restore(bench, few)
            case.add("sequential", "documents/s", few / bench.peer("backfill_sequential.py", NAMESPACE, api)[1])
            restore(bench, many)
            config = bench.backfill_config(COLLECTION, api, False)
            seconds = bench.ours("backfill", "--tps", NO_LIMIT, "--concurrency", "50", config=config)[1]
            case.add("mongorekey", "documents/s", many / seconds)
    case.compare("mongorekey", "sequential", True)
    return case


def duplicates(bench, rounds):
    """Calls and time where documents share a legacy key."""
    case = Case("backfill with duplicates", "documents/s and calls per distinct key")
    documents = 30_000 * bench.size
    for per_key in (1, 3, 10):
        prepare(bench, documents, per_key)
        calls = []
        with bench.key_api() as api:
            for _ in range(rounds):
                restore(bench, documents)
                config = bench.backfill_config(COLLECTION, api, True)
                result, seconds, _ = bench.ours("backfill", "--tps", NO_LIMIT, config=config)
                calls.append(result["api"]["calls"] / math.ceil(documents / per_key))
                case.add(f"{per_key} documents per key", "documents/s", documents / seconds)
        case.judge(f"{per_key} per key: calls per distinct key", calls, False, 1.0)
    return case

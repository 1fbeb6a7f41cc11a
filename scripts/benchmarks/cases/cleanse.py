"""Copies of a collection, what changes meanwhile, and the comparison of both sides."""

import time

from ..measure import DATABASE, Case

SOURCE = "source"
NAMESPACE = f"{DATABASE}.{SOURCE}"
CONFIG = f'[cleanse]\nsource = "{NAMESPACE}"\nkeep = \'{{"valid": true}}\'\n'


def documents(bench):
    return 1_000_000 * bench.size


def copy(bench, rounds, kept):
    """Ours, a bare `$out`, a bare `$merge`, and a script that reads and inserts."""
    case = Case(f"cleanse, {kept}% kept", f"seconds to copy {kept}% of {documents(bench):,} documents")
    bench.seed(SOURCE, documents(bench), valid_of_hundred=kept)
    expected = documents(bench) * kept // 100
    only_valid = {"$match": {"valid": True}}

    def checked(name, run):
        bench.forget()
        bench.database.copied.drop()
        begun = time.monotonic()
        run()
        seconds = time.monotonic() - begun
        found = bench.database.copied.count_documents({})
        assert found == expected, f"{name} copied {found} of {expected}"
        case.add(name, "s", seconds)

    sides = [
        lambda: checked("$out", lambda: aggregate(bench, [only_valid, {"$out": "copied"}])),
        lambda: checked("mongorekey", lambda: cleanse(bench)),
    ]
    bench.rounds(rounds, sides)
    checked("$merge", lambda: aggregate(bench, [only_valid, {"$merge": {"into": "copied"}}]))
    checked("read and insert", lambda: bench.peer("read_and_insert.py", NAMESPACE, "copied", '{"valid": true}'))
    case.compare("mongorekey", "$out", False, 1.1 if kept == 100 else None)
    if kept < 100:
        # The target allows 1.5 times $out and half a second.
        pairs = zip(case.side("mongorekey", "").values, case.side("$out", "").values)
        case.judge("mongorekey / (1.5 x $out + 0.5 s)", [ours / (1.5 * out + 0.5) for ours, out in pairs], False, 1.0)
    scans = [documents(bench) / seconds for seconds in case.side("mongorekey", "").values]
    case.side("mongorekey, scanned", "documents/s").values = scans
    return case


def aggregate(bench, pipeline):
    bench.database.command("aggregate", SOURCE, pipeline=pipeline, cursor={}, writeConcern={"w": "majority"})


def cleanse(bench):
    return bench.ours("cleanse", "--to", "copied", config=CONFIG)


def verify_all(bench):
    """Compares the copy with its source, all of it; returns the seconds it took and the peak memory in MiB."""
    result, seconds, peak = bench.ours("verify", "--full", "--restart", "--to", "copied", config=CONFIG)
    assert result["passed"], "the copy differs"
    return seconds, peak


def catch_up_and_verify(bench, catch_ups, rounds):
    """Changes after the copy are applied; then both sides are compared, by us and by a script."""
    caught = Case("catch-up", "changed documents/s applied after the copy")
    compared = Case("verify --full", "documents/s compared byte for byte")
    count, step = documents(bench), 5
    bench.seed(SOURCE, count)
    bench.forget()
    bench.database.copied.drop()
    cleanse(bench)
    for number in range(catch_ups):
        bench.database[SOURCE].aggregate([
            {"$match": {"_id": {"$mod": [step, number % step]}}},
            {"$set": {"round": number}},
            {"$merge": {"into": SOURCE, "whenMatched": "replace"}},
        ])
        result, seconds, peak = cleanse(bench)
        changes = result["followed"]["changes"]
        assert changes >= count // step, f"{changes} changes seen"
        caught.add("mongorekey", "changes/s", changes / seconds)
        caught.add("memory", "MiB", peak)

    def verify():
        seconds, peak = verify_all(bench)
        compared.add("mongorekey", "documents/s", count / seconds)
        compared.add("mongorekey: memory", "MiB", peak)

    def compare():
        output, seconds, peak = bench.peer("compare_raw.py", NAMESPACE, "copied")
        assert output.split() == [str(count), "0"], f"the script finds {output}"
        compared.add("PyMongo", "documents/s", count / seconds)
        compared.add("PyMongo: memory", "MiB", peak)

    bench.rounds(rounds, [verify, compare])
    caught.judge("changes/s", caught.side("mongorekey", "").values, True, 5_000)
    compared.compare("mongorekey", "PyMongo", True, 1.4)
    compared.judge("documents/s", compared.side("mongorekey", "").values, True, 120_000)
    return [caught, compared]

"""For how long a cutover holds an application's writes off."""

import contextlib
import subprocess
import sys

from ..measure import DATABASE, PEERS, Case
from .cleanse import CONFIG, NAMESPACE, SOURCE, cleanse

DOCUMENTS = 100_000
RATE = 1000
MOST_PAUSE = 200


def pause(bench, rounds):
    """Copies, and cuts over under updates, by each mode that holds writes off."""
    case = Case("cutover", f"milliseconds for which writes are held off; {DOCUMENTS:,} documents, {RATE:,} updates/s wanted")
    for mode in ("swap", "keep"):
        for _ in range(rounds):
            bench.forget()
            bench.database.copied.drop()
            bench.seed(SOURCE, DOCUMENTS)
            cleanse(bench)
            with load(bench) as made:
                command = ["cutover", "--mode", mode, "--max-pause", "2s", "--yes", "--to", "copied"]
                result, _, _ = bench.ours(*command, config=CONFIG)
            assert result["outcome"] == "cut_over", result
            case.add(mode, "ms", result["pause_ms"])
            case.add(f"{mode}: updates", "updates/s", made[0])
            if result["old_collection"]:
                bench.client[DATABASE].drop_collection(result["old_collection"].partition(".")[2])
        case.judge(f"pause of {mode} in ms", case.side(mode, "").values, False, MOST_PAUSE)
    return case


@contextlib.contextmanager
def load(bench):
    """An application that updates the source; yields a list that then holds its updates per second."""
    command = [sys.executable, str(PEERS / "load_updates.py"), bench.uri, NAMESPACE, str(DOCUMENTS), str(RATE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    made = []
    try:
        process.stdout.readline()
        yield made
    finally:
        made.append(float(process.communicate()[0]))

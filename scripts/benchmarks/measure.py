"""What every case needs: a server with documents, programs that are timed, ratios of rounds."""

import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pymongo

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
DATABASE = "benchmark"
SAMPLE_SECONDS = 0.05


@dataclass
class Side:
    """One side of a comparison: a figure per round."""

    name: str
    unit: str
    values: list = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.values)


@dataclass
class Ratio:
    """Ours against another side, a figure per round; `target` as in the design, where it has one."""

    case: str
    name: str
    values: list
    higher_is_better: bool
    target: float | None = None

    @property
    def median(self):
        return statistics.median(self.values)

    @property
    def best(self):
        return max(self.values) if self.higher_is_better else min(self.values)

    @property
    def is_reached(self):
        if self.target is None:
            return None
        return self.median >= self.target if self.higher_is_better else self.median <= self.target

    def json(self):
        return {**asdict(self), "median": self.median, "reached": self.is_reached}


@dataclass
class Case:
    """What one case found: its sides, and ratios between them of the same round."""

    name: str
    what: str
    sides: list = field(default_factory=list)
    ratios: list = field(default_factory=list)

    def side(self, name, unit):
        for side in self.sides:
            if side.name == name:
                return side
        self.sides.append(Side(name, unit))
        return self.sides[-1]

    def add(self, name, unit, value):
        self.side(name, unit).values.append(value)
        print(f"  {name}: {value:,.4g} {unit}", flush=True)

    def compare(self, ours, other, higher_is_better, target=None):
        pairs = zip(self.side(ours, "").values, self.side(other, "").values, strict=True)
        ratios = [one / another for one, another in pairs]
        self.ratios.append(Ratio(self.name, f"{ours} / {other}", ratios, higher_is_better, target))

    def judge(self, name, values, higher_is_better, target):
        """A figure that is held against a target without another side."""
        self.ratios.append(Ratio(self.name, name, list(values), higher_is_better, target))

    def json(self):
        return {"name": self.name, "what": self.what,
                "sides": [{**asdict(side), "median": side.median} for side in self.sides],
                "ratios": [ratio.json() for ratio in self.ratios]}


class Bench:
    """A server of its own, the release build, and the scripts that it is compared with."""

    def __init__(self, uri, program, pipeline, size):
        self.uri = uri
        self.program = program
        self.pipeline = pipeline
        self.size = size
        self.client = pymongo.MongoClient(uri, w="majority")
        self.database = self.client[DATABASE]

    def rounds(self, count, sides):
        """Runs all sides in each round, every other round in the opposite order."""
        for number in range(count):
            for side in sides if number % 2 == 0 else reversed(sides):
                side()

    # --- documents ---

    def seed(self, name, count, per_key=1, valid_of_hundred=100):
        """Documents of about 400 bytes, made by the server."""
        self.database.seeds.drop()
        self.database.seeds.insert_many([{"_id": number} for number in range(1000)])
        per_seed = -(-count // 1000)
        number = {"$add": [{"$multiply": ["$_id", per_seed]}, "$n"]}
        self.database.seeds.aggregate([
            {"$set": {"n": {"$range": [0, per_seed]}}},
            {"$unwind": "$n"},
            {"$set": {"_id": number}},
            {"$match": {"_id": {"$lt": count}}},
            {"$project": {
                "legacyKey": {"$concat": ["LEGACY-", {"$toString": {"$toInt": {"$floor": {"$divide": ["$_id", per_key]}}}}]},
                "valid": {"$lt": [{"$mod": ["$_id", 100]}, valid_of_hundred]},
                "name": {"$concat": ["name of ", {"$toString": "$_id"}]},
                "text": "x" * 300,
            }},
            {"$out": name},
        ])

    def forget(self):
        """Drops jobs and key map, so that a run is a first one."""
        self.client.drop_database("mongorekey")

    # --- programs ---

    def peer(self, script, *arguments):
        """Runs a script of peers/; returns its output, the seconds it took and its peak memory in MiB."""
        return timed_with_memory([sys.executable, str(PEERS / script), self.uri, *arguments])

    def ours(self, *arguments, config=""):
        """Runs mongorekey; returns its result, the seconds it took and its peak memory in MiB."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "mongorekey.toml"
            file.write_text(f'[mongodb]\nuri = "{self.uri}"\n{config}')
            output, seconds, peak = timed_with_memory(
                [self.program, "--config", str(file), "--output", "json", "-q", *arguments])
        return json.loads(output), seconds, peak

    @contextlib.contextmanager
    def key_api(self, *options):
        """A rehearsal key API; yields its address."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        command = [self.program, "mock-api", "--listen", f"127.0.0.1:{port}", *options]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **silent)
        try:
            wait_for_port(port)
            yield f"http://127.0.0.1:{port}/v1/keys/"
        finally:
            process.terminate()
            process.wait()

    def backfill_config(self, collection, api, key_map):
        return (f'[key_api]\nurl = "{api}{{key}}"\nkey_pointer = "/newKey"\n'
                f'[[backfill.targets]]\nname = "docs"\ncollection = "{DATABASE}.{collection}"\n'
                'legacy_field = "legacyKey"\nkey_field = "newKey"\nflag_field = "newKeyFlag"\n'
                f"[backfill]\nkey_map = {str(key_map).lower()}\n")


def wait_for_port(port):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    sys.exit("bench: the rehearsal key API does not listen")


def timed(command):
    begun = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - begun
    if result.returncode != 0:
        sys.exit(f"bench: {command[:2]} failed: {result.stdout[-500:]} {result.stderr[-2000:]}")
    return result.stdout, seconds


def timed_with_memory(command):
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - begun
        output = process.stdout.read()
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"bench: {command[0]} ended with {process.returncode}: {output[-1000:]} {errors.read()[-1000:]}")
    return output, seconds, peak


def resident(pid):
    """Peak of the resident memory in MiB; 0 where the process has just ended."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return 0.0

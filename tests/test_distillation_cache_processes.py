"""The teacher cache among processes: filled together, killed in the middle, and larger than the memory there is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekd.distillation.cache import TeacherCache, remove_oldest
from edgekd.types import Json


def quiet(event: str, /, **fields: Json) -> None:
    """A `Say` that is not listened to."""


FILLING = """
import signal, sys
from pathlib import Path
import numpy as np
from edgekd.distillation.cache import TeacherCache

root, start, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache = TeacherCache(
    root, {"teacher": "x"}, samples=600, limit_bytes=10**9, keep={"map": (3000,)},
    say=lambda event, **fields: print(event),
)
print("ready", flush=True)
sys.stdin.readline()
for view in range(8):
    mine = np.random.default_rng(view).permutation(600)[start::step]
    for part in np.array_split(mine, 40):
        value = (part * 3 + view)[:, None] % 2000 + np.zeros((1, 3000), np.float32)
        kept = cache.take(view, part)
        kept = cache.put(view, part, {"map": value}) if kept is None else kept
        assert (kept["map"] == value).all()
    print("view", flush=True)
    if view == 0 and len(sys.argv) > 4:
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[4]))  # the default of SIGALRM: dead on the spot
"""


def _filling(root: Path, start: int, step: int, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", FILLING, str(root), str(start), str(step), *more]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _right(root: Path, view: int) -> int:
    """How many samples of a view are there, all of which are right."""
    cache = TeacherCache(
        root, {"teacher": "x"}, samples=600, limit_bytes=10**9, keep={"map": (3000,)}, say=quiet
    )  # fmt: skip
    found = 0
    for sample in range(600):
        kept = cache.take(view, np.array([sample]))
        found += kept is not None
        assert kept is None or (kept["map"] == (sample * 3 + view) % 2000).all()
    return found


def test_processes_may_fill_one_cache_together(tmp_path: Path) -> None:
    """One takes half of every batch, as a rank does, the other all of it at the same time."""
    processes = [_filling(tmp_path, *share) for share in ((0, 2), (0, 1))]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate()[0] == "view\n" * 8
        assert process.returncode == 0
    assert [_right(tmp_path, view) for view in (0, 3, 7)] == [600] * 3
    assert not list(tmp_path.rglob("*.partial"))


def test_a_process_killed_while_it_writes_leaves_what_is_right(tmp_path: Path) -> None:
    process = _filling(tmp_path, 0, 1, "0.01")
    process.communicate("\n")
    assert process.returncode == -signal.SIGALRM
    assert _right(tmp_path, 0) == 600
    assert _right(tmp_path, 7) < 600
    for view in range(1, 7):
        _right(tmp_path, view)
    process = _filling(tmp_path, 0, 1)
    assert "corrupt" not in process.communicate("\n")[0]
    assert process.returncode == 0
    assert _right(tmp_path, 0) == _right(tmp_path, 7) == 600


def test_what_another_process_uses_is_not_removed(tmp_path: Path) -> None:
    process = _filling(tmp_path, 0, 1)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    remove_oldest(tmp_path, 0, say=quiet)
    assert folder.exists()
    process.communicate("\n")
    assert process.returncode == 0
    remove_oldest(tmp_path, 0, say=quiet)
    assert not folder.exists()


# ---------------------------------------------------------------- memory

REPLAYING = """
import resource, sys
from pathlib import Path
import numpy as np
from edgekd.distillation import cache as module

root, samples, views, resident, spare = Path(sys.argv[1]), *map(int, sys.argv[2:])
module._RESIDENT_BYTES = resident or module._RESIDENT_BYTES
module.shutil.disk_usage = lambda path: type("usage", (), {"free": 1 << 50})
told = []
cache = module.TeacherCache(
    root, {"teacher": "x"}, samples=samples, limit_bytes=1 << 40, keep={"logits": (10,), "map": (16, 32, 32)},
    say=lambda event, **fields: told.append(fields),
)

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def resident_bytes():
    return status("RssAnon") + status("RssFile")

def epoch(view, seed):
    peak = 0
    order = np.random.default_rng(seed).permutation(samples)
    for part in np.array_split(order, samples // 64):
        kept = cache.take(view, part)
        if kept is None:
            value = (part % 2000).astype(np.float32)
            kept = cache.put(view, part, {
                "logits": np.repeat(value[:, None], 10, 1),
                "map": np.broadcast_to(value[:, None, None, None], (len(part), 16, 32, 32)),
            })
        assert (kept["logits"][:, 3] == part % 2000).all() and (kept["map"][:, 5, 7, 9] == part % 2000).all()
        peak = max(peak, resident_bytes())
    return peak

view_bytes = samples * 2 * (10 + 16 * 32 * 32)
cache.put(0, np.arange(64), {"logits": np.zeros((64, 10)), "map": np.zeros((64, 16, 32, 32))})  # what is loaded late
cache.close()
for path in cache.folder.glob("*.0"):
    path.unlink()
before = resident_bytes()
limit = status("VmSize") + view_bytes + spare
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
peaks = [epoch(view, view + 7 * again) for again in (0, 1) for view in range(views)]
assert not told
total = sum(path.stat().st_size for path in cache.folder.iterdir())
print(total, before, max(peaks), status("VmHWM"))
"""


def _replayed(root: Path, samples: int, views: int, resident: int, spare: int) -> tuple[int, ...]:
    words = [sys.executable, "-c", REPLAYING, str(root), *map(str, (samples, views, resident, spare))]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_bounded_while_the_cache_is_larger(tmp_path: Path) -> None:
    """At an address space of one view and a little, and with less of it in memory than the view is large."""
    total, before, peak, _ = _replayed(tmp_path, 2048, 4, 16 << 20, 56 << 20)
    assert total > 256 << 20
    assert peak - before < 40 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cache_several_times_larger_than_the_memory_of_the_process(tmp_path: Path) -> None:
    total, _, peak, high = _replayed(tmp_path, 16_384, 6, 0, 128 << 20)
    assert total > 3 << 30
    assert peak < 900 << 20
    assert high < 900 << 20

"""Is the suite green on other processors? Under each setting that makes this one compute as another, one after the other.

    python tests/proofs/processors.py [--out runs/processors] [--only WORD ...] [-- WORDS OF PYTEST]

torch, oneDNN and MKL choose their kernels by what a processor can do, and each kernel sums in its own order, as does each
number of threads. What this processor lacks is left out. --only: the settings in whose name one of these words is.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("DEFAULT", "AVX2", "AVX512")  # the kinds of processors that torch tells apart, each of which is all before it
SETTINGS = [  # (kind of processor that it takes, what is set)
    ("DEFAULT", {}),
    ("DEFAULT", {"ATEN_CPU_CAPABILITY": "default"}),
    ("DEFAULT", {"MKL_CBWR": "COMPATIBLE"}),
    ("AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    ("AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ("AVX2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    ("AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    ("AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    ("DEFAULT", {"OMP_NUM_THREADS": "1"}),
    ("DEFAULT", {"OMP_NUM_THREADS": "2"}),
    ("DEFAULT", {"OMP_NUM_THREADS": "4"}),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/processors", help="where what pytest says is kept")
    parser.add_argument("--only", nargs="+", default=[""], help="settings in whose name one of these words is")
    parser.add_argument("words", nargs="*", help="of pytest, after --")
    given = parser.parse_args()
    out = Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    has = torch.backends.cpu.get_cpu_capability()
    level = ORDER.index(has) if has in ORDER else 0
    print(
        f"{has}, {torch.get_num_threads()} threads\n\n| set | the suite's last line | minutes |\n|---|---|---|",
        flush=True,
    )

    failed = False
    for kind, variables in SETTINGS:
        name = " ".join(f"{key}={value}" for key, value in variables.items()) or "nothing"
        if ORDER.index(kind) > level or not any(word in name for word in given.only):
            continue
        began, log = time.monotonic(), out / f"{name.replace(' ', ',')}.log"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", *given.words]
        with open(log, "w", encoding="utf-8") as file:
            status = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **variables}, stdout=file, stderr=file
            ).returncode
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1].strip("= ")
        print(f"| {name} | {last} | {(time.monotonic() - began) / 60:.1f} |", flush=True)
        failed = failed or status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

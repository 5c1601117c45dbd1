"""Where the repository is, the tests' own files, and the shared measurements where they are there."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests" / "files"
SHARED = ROOT.parent / "shared"
LATENCY_DATA = SHARED / "latency_data"

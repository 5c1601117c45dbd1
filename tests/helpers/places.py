"""Paths of the repository, of the tests' own files, and of the shared measurements if they exist."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests" / "files"
SHARED = ROOT.parent / "shared"
LATENCY_DATA = SHARED / "latency_data"

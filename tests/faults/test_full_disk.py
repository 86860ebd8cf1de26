"""A disk that fills up, as a limit on the size of a file, in a process of its own: a clear error and a whole file."""

import os
import subprocess
import sys
import textwrap

from qzo.journal import read_journal
from qzo.metrics import read_metrics


def test_journal(tmp_path):
    """A limit on the size of a file, hit in the middle of a record; then there is space again."""
    code = """
    import resource, signal, sys
    import numpy as np
    from qzo.errors import RunFailed
    from qzo.journal import Journal, Record
    journal = Journal.create(sys.argv[1], {"directions": 2, "count": 4})
    size = journal.path.stat().st_size
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40 * 2 + 13, hard))
    record = lambda step: Record(step, 0, np.float32(step), np.zeros(2, np.float32), np.ones(4, np.float32))
    journal.append(record(0))
    journal.append(record(1))
    try:
        journal.append(record(2))
    except RunFailed as error:
        print(error)
    assert journal.path.stat().st_size == size + 40 * 2 and len(journal.records) == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.append(record(2))
    journal.close()
    """
    path = tmp_path / "j"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout and "File too large" in result.stdout and "Free some space" in result.stdout
    assert [float(record.loss) for record in read_journal(path)[1]] == [0, 1, 2]


def test_journal_header(tmp_path):
    code = """
    import resource, signal, sys
    from qzo.errors import RunFailed
    from qzo.journal import Journal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
    try:
        Journal.create(sys.argv[1], {"directions": 2, "count": 4})
    except RunFailed as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "j")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "File too large" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == []


def test_metrics(tmp_path):
    code = """
    import resource, signal, sys
    from qzo.errors import RunFailed
    from qzo.metrics import Metrics
    metrics = Metrics(sys.argv[1])
    metrics.write({"step": 0})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
    try:
        metrics.write({"step": 1, "note": "x" * 100})
    except RunFailed as error:
        print(error)
    """
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert str(path) in result.stdout and "Free some space" in result.stdout, result.stderr
    assert read_metrics(path) == [{"step": 0}]

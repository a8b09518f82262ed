"Whoever reads the journal while an agent writes it misses nothing: a sink's cursor would pass it by, and never come back."

import numpy as np

from pdm.stream.journal import Event, Group, Journal, JournalReader, Mark, Row

ASSET, STREAM, EPOCH = "e/s/a/l/fan", "vibration", 7


def group(seq):
    "A window that raises an alarm."
    row = Row(asset=ASSET, stream=STREAM, epoch=EPOCH, seq=seq, t_ns=seq * 10**9, t0_ns=seq * 10**9, score=1.5, p_value=0.5, p_unadapted=0.5, offset_db=0.0, threshold=1.6,
              alarm=True, severity=1, state="running", fault="undetermined", episode="fan@1", supported=True, extrapolating=False, channel_scores={"h": 1.5}, indicators={},
              conditions={}, embedding=np.zeros(3, np.float32), model="ab" * 32, engine="triton")
    return Group(rows=[row], events=[Event(ASSET, STREAM, f"fan@{seq}", "raised", seq * 10**9, EPOCH, seq)], marks={(ASSET, STREAM, EPOCH): Mark(EPOCH, seq)})


def test_what_is_committed_in_the_middle_of_a_read_comes_with_the_next(tmp_path):
    journal = Journal(tmp_path / "journal.db")
    journal.commit([group(0)])
    reader = JournalReader(journal.path)
    due = [1, 2, 3]

    def meanwhile(sql):
        if due and " FROM " in sql:
            journal.commit([group(due.pop(0))])

    reader._db.set_trace_callback(meanwhile)
    found = []
    while some := reader.read(found[-1].id if found else 0):
        found += some
    assert [r.id for r in found] == list(range(1, 9))
    reader.close()
    journal.close()

"""What people found out is taken in once, wherever it stands, and what can't be taken in is told with its row and its column."""

import sqlite3

import pandas as pd
import pytest

from pdm.errors import InvalidInput, PartMissing
from pdm.loop.labels import COLUMNS, WHAT, labels_in, labels_of, read_labels
from pdm.stream.alarms import REASONS
from pdm.stream.records import Event

PUMP, FAN = "acme/bergen/hall/line2/pump", "acme/bergen/hall/line2/fan"
HOUR = 3_600_000_000_000


def csv(folder, text):
    file = folder / "orders.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_good_rows_come_with_a_list_of_those_that_were_refused(tmp_path):
    read = read_labels(csv(tmp_path, "\n".join([
        "asset,time,what,until,fault,source,by,comment",
        f'{PUMP},2026-03-01T10:00Z,damage,2026-03-02T10:00Z,outer_race,SAP,ann,"loud, then hot"',
        f"{PUMP},01.03. early,damage,,,,,",
        f"{PUMP},2026-03-01,broken,,,,,",
        "pump,2026-03-01,damage,,,,,",
        f"{PUMP},2026-03-03,damage,2026-03-02,,,,",
        ",,failure,,,,,",
        f"{FAN},2026-03-01T10:00+02:00,inspected_healthy,,,,,"])))
    assert [(x.asset, x.what, x.fault, x.source, x.by, x.comment) for x in read.labels] == [
        (FAN, "inspected_healthy", "", "orders.csv", "", ""), (PUMP, "damage", "outer_race", "SAP", "ann", "loud, then hot")]
    assert read.labels[0].t_ns == pd.Timestamp("2026-03-01T08:00Z").value
    assert [r.row for r in read.refused] == [2, 3, 4, 5, 6]
    for refused, words in zip(read.refused, ("time '01.03. early'", "what 'broken' is none of", "five levels", "until 2026-03-02 is before", "asset and time are empty"), strict=True):
        assert words in refused.reason


def test_the_same_finding_told_again_is_one_label_wherever_it_stands(tmp_path):
    row = {"asset": PUMP, "time": "2026-03-01T10:00:00Z", "what": "failure", "until": "", "fault": "cage"}
    first = labels_in(pd.DataFrame([row]), "a")
    again = labels_in(pd.DataFrame([row | {"time": pd.Timestamp("2026-03-01 11:00", tz="Europe/Oslo"), "until": None, "by": "bob"}, row]), "b")
    other = labels_in(pd.DataFrame([row | {"fault": "ball"}]), "a")
    assert again.labels[0].id == first.labels[0].id != other.labels[0].id
    assert (len(again.labels), again.twice) == (1, 1)


def test_names_are_completed_where_the_assets_are_known():
    table = pd.DataFrame([{"asset": a, "time": "2026-03-01", "what": "damage"} for a in ("pump", "line2/fan", "pmup", "acme/bergen/hall/line2/pump")])
    read = labels_in(table, "", [PUMP, FAN, "acme/oslo/hall/line2/fan"])
    assert [x.asset for x in read.labels] == [PUMP] and read.twice == 1
    assert [r.row for r in read.refused] == [2, 3]
    assert "more than one" in read.refused[0].reason and "did you mean 'pump'" in read.refused[1].reason


@pytest.mark.parametrize("columns,words", [(["asset", "when", "what"], "has no column time"), (["asset", "time", "what", "fautl"], "did you mean 'fault'?"), ([], "it has none")])
def test_a_table_without_the_columns_is_refused_whole(columns, words):
    with pytest.raises(InvalidInput, match="expected asset, time, what") as e:
        labels_in(pd.DataFrame(columns=columns), "orders.csv")
    assert words in str(e.value)


def test_columns_of_others_are_passed_over():
    assert len(labels_in(pd.DataFrame([{"asset": PUMP, "time": "2026-03-01", "what": "test", "cost": 12, "order no": 7}])).labels) == 1


def test_a_table_of_a_database_is_read(tmp_path):
    with sqlite3.connect(tmp_path / "cmms.db") as db:
        db.execute("CREATE TABLE orders (asset, time, what, until)")
        db.execute("INSERT INTO orders VALUES (?, '2026-03-01T10:00Z', 'damage', NULL)", [PUMP])
    read = read_labels(f"sqlite:///{tmp_path}/cmms.db?table=orders")
    assert (read.labels[0].t_ns, read.labels[0].until_ns, read.labels[0].source) == (pd.Timestamp("2026-03-01T10:00Z").value,) * 2 + ("sqlite:cmms.db.orders",)
    with pytest.raises(InvalidInput, match="names no table"):
        read_labels(f"sqlite:///{tmp_path}/cmms.db")
    with pytest.raises(InvalidInput, match="names no table"):
        read_labels(f'sqlite:///{tmp_path}/cmms.db?table=orders";drop')
    with pytest.raises(PartMissing, match="no such table"):
        read_labels(f"sqlite:///{tmp_path}/cmms.db?table=others")
    with pytest.raises(PartMissing, match="unable to open"):
        read_labels(f"sqlite:///{tmp_path}/none.db?table=orders")


def test_what_is_no_such_file_is_told(tmp_path):
    with pytest.raises(PartMissing, match="No such file"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(InvalidInput, match="neither .csv nor .parquet"):
        read_labels(tmp_path / "orders.xlsx")
    (tmp_path / "orders.parquet").write_text("no")
    (tmp_path / "latin.csv").write_bytes(b"asset,time,what\n\xe4,2026,damage\n")
    for name in ("orders.parquet", "latin.csv"):
        with pytest.raises(InvalidInput, match="is not what its name says"):
            read_labels(tmp_path / name)
    with pytest.raises(PartMissing, match="postgresql"):
        read_labels("postgresql://ann:secret@127.0.0.1:1/cmms?table=orders")


def test_a_password_in_an_address_stands_in_no_message():
    with pytest.raises(PartMissing) as e:
        read_labels("postgresql://ann:secret@127.0.0.1:1/cmms?table=orders")
    assert "secret" not in str(e.value)


def event(kind, t_h, episode="", **details):
    return Event(PUMP, "", episode, kind, t_h * HOUR, 0, -1, details)


def test_the_last_word_on_an_alarm_counts_and_it_speaks_of_the_time_of_the_alarm():
    episode = f"{PUMP}@{2 * HOUR}"
    told = [event("raised", 2, episode), event("cleared", 4, episode), event("labelled", 9, episode, reason="false_alarm", by="ann"),
            event("labelled", 10, episode, reason="damage", fault="ball", by="bob")]
    label, = labels_of(told)
    assert (label.what, label.fault, label.by, label.t_ns, label.until_ns, label.episode) == ("damage", "ball", "bob", 2 * HOUR, 4 * HOUR, episode)
    alone, = labels_of(told[2:3])  # the alarm itself was before anybody looked
    assert (alone.t_ns, alone.until_ns) == (2 * HOUR, 9 * HOUR)


def test_work_on_a_machine_is_a_label_of_its_time():
    told = [event("maintenance_began", 1, by="ann"), event("maintenance_ended", 3, by="ann", what="bearing replaced"), event("maintenance", 5, what="greased"), event("maintenance_began", 8)]
    assert [(x.what, x.t_ns // HOUR, x.until_ns // HOUR, x.comment) for x in labels_of(told)] == [
        ("maintenance", 1, 3, "bearing replaced"), ("maintenance", 5, 5, "greased"), ("maintenance", 8, 8, "")]


def test_every_reason_of_an_alarm_is_a_label():
    assert {*REASONS} < {*WHAT} and COLUMNS[:3] == ("asset", "time", "what")

"""The ICD-10-CM tree: its shape and size, codes as people write them, labels found, and the hierarchical credit."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from m3.environment import icd10
from m3.environment.icd10 import Credits, tree


def test_size_of_the_release():
    """The XML has 22 chapters, 297 sections, 1,918 categories; with seventh characters 98,505 entries."""
    levels = [tree().level(code) for code in tree()]
    counted = {level: levels.count(level) for level in ("chapter", "block", "category", "code")}
    assert counted == {"chapter": 22, "block": 297, "category": 1918, "code": 96268}
    assert icd10.DATA.stat().st_size < 1_000_000


def test_loads_in_under_three_tenths_of_a_second():
    began = time.perf_counter()
    assert icd10.Tree().describe("I21.11").startswith("ST elevation")
    assert time.perf_counter() - began < 0.3


WRITTEN = {
    "I21.11": "I21.11",
    "i2111": "I21.11",
    " I21.11. ": "I21.11",
    "i21": "I21",
    "s6491xa": "S64.91XA",
    "9": "9",
    "i20-i25": "I20-I25",
    "I21.99": None,
    "": None,
    "flu": None,
}


@pytest.mark.parametrize(("written", "code"), WRITTEN.items())
def test_normalise(written, code):
    assert tree().normalise(written) == code
    assert (written in tree()) == (code is not None)


def test_one_entry_whole():
    node = tree().node("i21.11")
    assert (node.code, node.level, node.parent, node.is_leaf) == ("I21.11", "code", "I21.1", True)
    assert node.description == "ST elevation (STEMI) myocardial infarction involving right coronary artery"
    assert node.terms == ("Inferoposterior transmural (Q wave) infarction (acute)",)


def test_ancestors_and_children():
    assert tree().ancestors("I21.11") == ("I21.1", "I21", "I20-I25", "9")
    assert tree().children("I21.1") == ("I21.11", "I21.19")
    assert tree().ancestors("9") == ()
    assert tree().parent("9") is None
    assert tree().children("I21.11") == ()


def test_levels_by_name():
    assert (tree().chapter("I21.11"), tree().block("I21.11"), tree().category("I21.11")) == ("9", "I20-I25", "I21")
    assert tree().category("I20-I25") is None
    assert tree().chapter("9") == "9"


def test_block_of_one_category_has_a_name_of_its_own():
    assert tree().ancestors("C50.0") == ("C50", "C50-C50", "2")
    assert tree().describe("C50-C50") == "Malignant neoplasms of breast (C50)"
    assert tree().normalise("c50") == "C50"


def test_seventh_character_continues_its_parents_description():
    assert tree().parent("S64.91XA") == "S64.91"
    assert tree().describe("S64.91XA") == tree().describe("S64.91") + ", initial encounter"


def test_unknown_code_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=re.escape("icd10: code: want a code of ICD-10-CM, April 2026; got 'I21.118'")):
        tree().describe("I21.118")
    assert tree().nearest("I21.118") == "I21.11"
    assert tree().nearest("Z") is None


LABELS = {
    "acute myocardial infarction": "I21",
    "Deep vein thrombosis": "I82.40",
    "type 2 diabetes mellitus": "E11",
    "migraine with aura": "G43.1",
    "Myasthenia gravis": "G70.0",
    "eczema": "L30.9",
    "appendicitis": "K37",
}


@pytest.mark.parametrize(("label", "code"), LABELS.items())
def test_find(label, code):
    """Labels whose words are those of an entry: the score is 1."""
    best = tree().find(label, 1)[0]
    assert (best.code, best.score) == (code, 1.0)


def test_find_nothing_and_k():
    assert tree().find("zzz qqq") == []
    assert tree().find("") == []
    found = tree().find("pneumonia", 7)
    assert len({one.code for one in found}) == 7
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    with pytest.raises(ValueError, match=r"icd10\.find: k: want"):
        tree().find("pneumonia", 0)


def test_codes_in_a_text():
    assert icd10.codes_in("Pneumonia (J18.9), not A00.7 of the list; J18.9 again, B12 and COPD [J44.1]") == [
        "J18.9",
        "J44.1",
    ]


# (reference, answer): common entry, credit
CREDITS = {
    "itself": ("I21.11", "I21.11", "I21.11", 1.0),
    "below_the_reference": ("I21", "I21.11", "I21", 1.0),
    "sister_at_the_last_step": ("I21.11", "I21.19", "I21.1", 0.8),
    "one_step_short": ("I21.11", "I21.1", "I21.1", 0.8),
    "category_only": ("I21.11", "I21.4", "I21", 0.6),
    "block_only": ("I21.11", "I25.10", "I20-I25", 0.3),
    "chapter_only": ("I21.11", "I10", "9", 0.1),
    "chapter_asked_for": ("9", "I10", "9", 1.0),
    "off_branch": ("I21.11", "J18.9", None, -0.1),
    "reference_is_a_category": ("I21", "I22", "I20-I25", 0.3),
}


@pytest.mark.parametrize(("reference", "answer", "common", "credit"), CREDITS.values(), ids=CREDITS)
def test_credit_of_the_lowest_common_ancestor(reference, answer, common, credit):
    found = tree().match(reference, answer)
    assert found.common == common
    assert found.credit == pytest.approx(credit)


def test_levels_are_told_apart():
    found = tree().match("I21.11", "I25.10")
    assert (found.chapter, found.block, found.category, found.exact) == (True, True, False, False)
    found = tree().match("I21.11", "J18.9")
    assert (found.chapter, found.block, found.category, found.exact) == (False, False, False, False)


def test_credits_are_configurable_and_ordered():
    assert tree().match("I21.11", "J18.9", Credits(off_branch=-0.5)).credit == -0.5
    with pytest.raises(ValueError, match=r"icd10\.Credits: levels: want"):
        Credits(block=0.7)
    with pytest.raises(ValueError, match=r"icd10\.Credits: levels: want"):
        Credits(off_branch=0.1)


# -- build ------------------------------------------------------------------------------------------------------------
TABULAR = """<ICD10CM.tabular><chapter><name>1</name><desc>First</desc><section id="A00-A09"><desc>Block</desc>
<diag><name>A00</name><desc>Thing</desc><sevenChrDef><extension char="A">initial</extension></sevenChrDef>
<diag><name>A00.1</name><desc>Small  thing</desc><inclusionTerm><note>Thinglet</note></inclusionTerm></diag></diag>
</section><section id="B99"><desc>Last</desc><diag><name>B99</name><desc>End</desc></diag></section></chapter>
</ICD10CM.tabular>"""


def wheel(path: Path) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/data/icd10c-tabular-x.xml", TABULAR)
        archive.writestr("p/data/code-list-x.txt", "A001\r\nA001XXA\r\nB99\r\n")
    return path


def test_build_by_hand(tmp_path):
    assert icd10.build(wheel(tmp_path / "w.whl"), tmp_path / "t.zip") == 7
    found = icd10.Tree(tmp_path / "t.zip")
    assert list(found) == ["1", "A00-A09", "A00", "A00.1", "A00.1XXA", "B99-B99", "B99"]
    assert found.describe("A00.1XXA") == "Small thing, initial"
    assert found.terms("A00.1") == ("Thinglet",)
    assert found.ancestors("B99") == ("B99-B99", "1")


def test_same_source_same_bytes(tmp_path):
    source = wheel(tmp_path / "w.whl")
    icd10.build(source, tmp_path / "one.zip")
    icd10.build(source, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_build_of_something_else_is_refused(tmp_path):
    icd10.build(wheel(tmp_path / "w.whl"), tmp_path / "t.zip")
    with pytest.raises(ValueError, match=r"icd10\.build: source: want a wheel of simple-icd-10-cm"):
        icd10.build(tmp_path / "t.zip", tmp_path / "u.zip")

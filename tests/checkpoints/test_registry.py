from __future__ import annotations

import re

import pytest

import scfm
from scfm.checkpoints import _registry

RELEASED = [entry for entry in _registry.entries().values() if entry.bundled is None]


@pytest.mark.parametrize("entry", RELEASED, ids=lambda entry: entry.name)
def test_entry_is_complete(entry):
    assert entry.title
    assert entry.source.startswith("https://")
    assert entry.citation.text
    assert re.fullmatch(r"10\.\d+/\S+", entry.citation.doi)
    assert entry.licence.name
    assert entry.licence.text
    assert entry.licence.url.startswith("https://")
    assert entry.licence.commercial in ("yes", "no", "unstated")
    assert [file.role for file in entry.files].count("weights") == 1
    assert any(file.role == "vocabulary" for file in entry.files)
    for file in entry.files:
        assert file.url or (entry.by_hand and entry.by_hand.link.startswith("https://") and entry.by_hand.text)
        if file.sha256:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.hash_source
            assert file.bytes_exact
        else:
            assert not file.hash_verified
    for mirror in entry.mirrors:
        assert mirror.note
        assert set(mirror.files) <= {file.name for file in entry.files}


def test_all_four_models_and_no_name_twice():
    assert {entry.backbone for entry in RELEASED} == {"scgpt", "scfoundation", "cellfm", "sclong"}
    names = [name for entry in _registry.entries().values() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


def test_only_explicitly_open_weights_need_no_consent():
    assert all(entry.licence.needs_consent for entry in RELEASED)
    assert not _registry.Licence("BSD", "", "yes", "").needs_consent


def test_list_shows_status(tmp_path):
    table = scfm.checkpoints.list().set_index("name")
    assert list(table.columns) == ["backbone", "title", "size", "licence", "commercial", "status"]
    assert table.loc["scgpt", "size"] == "206.7 MB"
    assert table.loc["scgpt-blood-adamson", "size"] == "unknown"
    assert table.loc["scgpt", "status"] == "by hand"
    assert table.loc["cellfm-80m", "status"] == "downloadable"
    directory = scfm.settings.cachedir / "scgpt"
    directory.mkdir(parents=True)
    for name in ("best_model.pt", "args.json"):
        (directory / name).touch()
    assert scfm.checkpoints.info("scgpt").status == "by hand"
    (directory / "vocab.json").touch()
    assert scfm.checkpoints.info("scgpt").status == "cached"


def test_info_prints_what_a_user_has_to_know():
    text = repr(scfm.checkpoints.info("xTrimoGene"))
    assert "Checkpoint scfoundation" in text
    for part in (
        "commercial use: no",
        "10.1038/s41592-024-02305-7",
        "sharepoint.com",
        "models.ckpt",
        "cell, rde, gene",
    ):
        assert part in text


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"'scfoundaton'.*Did you mean 'scfoundation'.*checkpoints\.list"):
        scfm.checkpoints.info("scfoundaton")
    with pytest.raises(ValueError, match="there is no checkpoint") as error:
        scfm.checkpoints.info("zzzzzzz")
    assert "Did you mean" not in str(error.value)


def test_unknown_file_and_mirror_name_what_there_is():
    entry = scfm.checkpoints.info("scfoundation")
    with pytest.raises(ValueError, match=r"no file 'x'; its files are models\.ckpt"):
        entry.file("x")
    with pytest.raises(ValueError, match="no mirror 'x'.*genbio-ai"):
        entry.mirror("x")
    with pytest.raises(ValueError, match="there are: none"):
        scfm.checkpoints.info("scgpt").mirror("czi-scgenept")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (12e9, "12.0 GB")]
)
def test_human_bytes(number, text):
    assert _registry.human_bytes(number) == text


def test_hashes_of_vocabularies_match_the_developers_copies(shared):
    from scfm.checkpoints._files import sha256

    known = {file.name: file for entry in RELEASED for file in entry.files if file.sha256}
    for name, path in {
        "OS_scRNA_gene_index.19264.tsv": shared("data", "vocab", "scfoundation", "OS_scRNA_gene_index.19264.tsv"),
        "expand_gene_info.csv": shared("data", "vocab", "cellfm", "expand_gene_info.csv"),
        "gene_info.csv": shared("data", "vocab", "cellfm", "gene_info.csv"),
        "vocab.json": shared("data", "vocab", "scgpt", "whole_human_vocab.json"),
        "args.json": shared("data", "vocab", "scgpt", "whole_human_args.json"),
    }.items():
        assert (path.stat().st_size, sha256(path)) == (known[name].bytes, known[name].sha256)

import json
import os

import numpy as np
import pytest
from stores import LOW, fill, make, new

from mlsbi.store.files import write_file
from mlsbi.store.store import StoreError, create_store, open_store


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="thesis.tex"):
        new(tmp_path)
    assert os.listdir(tmp_path / "store") == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        create_store(tmp_path / "file", {}, ["low"], ["mu"])


def test_a_store_is_made_once(tmp_path):
    fill(new(tmp_path), (LOW, make([0])))
    with pytest.raises(StoreError, match="holds a store already"):
        new(tmp_path)
    (tmp_path / "store" / "store.json").unlink()
    with pytest.raises(StoreError, match="shards"):
        new(tmp_path)


def test_a_newer_layout_is_refused(tmp_path):
    manifest = new(tmp_path).manifest
    write_file(tmp_path / "store" / "store.json", json.dumps(manifest | {"layout": 2}).encode())
    with pytest.raises(StoreError, match="has layout 2; this version reads up to 1. Upgrade"):
        open_store(tmp_path / "store")
    write_file(tmp_path / "store" / "store.json", b'{"format": "other", "layout": 1}')
    with pytest.raises(StoreError, match="format 'other'"):
        open_store(tmp_path / "store")


def test_the_manifest_says_what_the_store_is_of(tmp_path):
    new(tmp_path, costs=[1.0, 2.0], row_costs=[1.0, 3.0])
    store = open_store(tmp_path / "store")
    assert (store.description, store.names, store.parameters) == ({"stack": "a"}, ("low", "high"), ("mu", "sigma"))
    assert store.manifest["costs"] == [1.0, 2.0]
    assert store.manifest["versions"]["numpy"] == np.__version__

"""clipdist/models/open_clip_files.py says what open_clip itself says."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest

from clipdist.models import open_clip_files


def test_names_and_descriptions_are_open_clips():
    known = open_clip_files.model_names()
    assert set(known) <= set(open_clip.list_models())  # which has models that other tests register, too
    assert len(known) > 100
    for name in known:
        assert open_clip_files.model_config(name) == open_clip.get_model_config(name), name
    assert open_clip_files.model_config("../../x") is None


@pytest.mark.parametrize("section", [open_clip.CLIPVisionCfg, open_clip.CLIPTextCfg])
def test_fields_are_those_of_open_clips_dataclasses(section):
    assert open_clip_files.config_fields(section.__name__) == {field.name for field in dataclasses.fields(section)}


def test_pixel_statistics_are_open_clips():
    assert open_clip_files.OPENAI_MEAN == open_clip.OPENAI_DATASET_MEAN
    assert open_clip_files.OPENAI_STD == open_clip.OPENAI_DATASET_STD

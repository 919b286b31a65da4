"""Tiny pipelines of every family as directories."""

import pytest


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """directories(name): a saved pipeline, that nobody changes."""
    import tiny

    made = {}

    def at(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny.pipeline(name).save_pretrained(made[name])
        return made[name]

    return at

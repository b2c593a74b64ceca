"""With UV_TORCH_BACKEND in the environment make demo and make test work wherever they work without it."""

from __future__ import annotations

import pytest

import uv_places


@pytest.fixture
def uv(tmp_path):
    """Makes a uv that ends with an exit status, and notes that it was called."""

    def make(status):
        program = tmp_path / "uv"
        program.write_text(
            f"#!/bin/sh\necho called $UV_TORCH_BACKEND >> {tmp_path}/calls\necho no host >&2\nexit {status}"
        )
        program.chmod(0o755)
        return program

    return make


def test_backend_that_is_not_reached_is_dropped_aloud(uv, tmp_path, capsys):
    environment = {"UV_TORCH_BACKEND": "cpu", "PATH": "/usr/bin:/bin"}
    uv_places.drop_if_unreachable(uv(2), environment)
    assert "UV_TORCH_BACKEND" not in environment
    assert "UV_TORCH_BACKEND=cpu: no torch there (no host)" in capsys.readouterr().err
    assert (tmp_path / "calls").read_text() == "called cpu\n"


def test_backend_that_is_reached_is_kept(uv, capsys):
    environment = {"UV_TORCH_BACKEND": "cpu", "PATH": "/usr/bin:/bin"}
    uv_places.drop_if_unreachable(uv(0), environment)
    assert environment["UV_TORCH_BACKEND"] == "cpu"
    assert not capsys.readouterr().err


def test_nothing_is_asked_without_one(uv, tmp_path):
    uv_places.drop_if_unreachable(uv(2), {})
    assert not (tmp_path / "calls").exists()

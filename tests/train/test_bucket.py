"""--output_dir at a URL: the same run as on a disk, whenever it is killed and however the
store fails.

On a disk (file://) by default; the heavy tests have S3 over HTTP (moto's server).
"""

import os
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from mora_ds.checkpoint import manager
from mora_ds.checkpoint.manager import complete_checkpoints
from mora_ds.checkpoint.verify import verify
from mora_ds.common import object_store
from mora_ds.common.errors import NonFatalFailure, RunError, UserError
from mora_ds.common.fetched import local, with_urls
from mora_ds.common.files import config_path, read_json
from mora_ds.data import load_tokenizer
from mora_ds.deploy.export import export_merged
from mora_ds.train.output_folder import reserve
from mora_ds.train.remote_folder import RemoteFolder
from tests.helpers.buckets import (
    SECRET,
    downloaded,
    flaky,
    google_cloud_storage,
    reach,
    read_only_from,
    slow,
)
from tests.helpers.gloo import end, run_alone, run_ranks, start_ranks
from tests.helpers.jobs import curve, job, refused, run
from tests.helpers.kills import killed_run
from tests.helpers.outcome import assert_good, tree
from tests.helpers.resume import MERGING, interrupted_job
from tests.helpers.token_files import KINDS, tokens_of, write_tokens
from tests.helpers.tools import called

FLAGS = f"{MERGING} --train_norms true --mora_dropout 0.1 --save_total_limit 2"
CONFIG = config_path("models/tiny_llama")
AUTO = "--resume_from_checkpoint auto"
EXPORT = "--export_merged true"


@pytest.fixture(scope="module")
def reference(user, tmp_path_factory):
    """The run on a disk, of two ranks."""
    out = tmp_path_factory.mktemp("disk") / "out"
    run(2, user.flags(out, FLAGS, EXPORT))
    return out


def assert_same_stored(folder, reference):
    """Curve, checkpoints and merged model, byte for byte."""
    assert curve(folder) == curve(reference)
    for name in ("checkpoints", "merged"):
        assert tree(folder / name) == tree(reference / name), name
    assert {"run.yaml", "summary.json", "tensorboard"} <= {
        path.name for path in folder.iterdir()
    }
    assert not (folder / ".lock").exists()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "moment",
    [
        "engine_shard_half_written", "after_the_shards", "before_the_manifest", "ledger_half_copied",
        "before_the_rename", "before_the_first_latest", "right_after_a_merge", "cycle_not_in_the_ledger",
        "before_the_summary", "before_the_run_is_begun", "run_file_half_written",
    ],
)  # fmt: skip
def test_a_killed_run_in_a_store_ends_as_one_on_a_disk(
    user, reference, tmp_path, moment
):
    """All that it has written lies in the store, the working folders are gone."""
    url = f"file://{tmp_path}/store/run"
    argv = user.flags(url, FLAGS, EXPORT, AUTO, "--cache_dir", tmp_path / "cache")
    killed_run(2, argv, moment, [0, 1])
    run(2, argv)
    assert_same_stored(downloaded(url, tmp_path / "run"), reference)
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_store_that_holds_a_run_is_refused_and_stays_as_it_was(user, tmp_path):
    url = f"file://{tmp_path}/store/run"
    argv = user.flags(url, "--max_steps 2")
    run(1, argv)
    before = tree(tmp_path / "store")
    kind, message = run_alone(refused, argv)
    assert kind == "UserError"
    assert f"--output_dir {url} holds another run" in message
    assert tree(tmp_path / "store") == before
    again = [*argv, "--overwrite_output_dir", "--max_steps", "3"]
    assert run(1, again)["steps"] == 3
    steps = [
        path.name for path in complete_checkpoints(tmp_path / "store/run/checkpoints")
    ]
    assert steps == ["step-000003"]


@pytest.mark.parametrize("name", ["merged", "checkpoints", "summary.json"])
def test_what_no_run_has_made_is_refused_and_stays(tmp_path, name):
    theirs = tmp_path / "store" / name
    if not theirs.suffix:
        theirs /= "step-000001/file"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    before = tree(tmp_path / "store")
    remote = RemoteFolder(f"file://{tmp_path}/store", tmp_path)
    remote.open()
    with pytest.raises(UserError, match=f"holds {name}, and no run that has made it"):
        reserve(remote.folder)
    remote.close()
    assert not remote.folder.exists()
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("name", ["run.yaml", "summary.json"])
def test_no_file_of_any_size_is_fetched(tmp_path, monkeypatch, name):
    """As many gigabytes as the store says it has."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).touch()
    os.truncate(tmp_path / "store" / name, 2**40)
    monkeypatch.setattr(
        object_store.ObjectStore, "fetch", lambda *_: pytest.fail("fetched")
    )
    remote = RemoteFolder(f"file://{tmp_path}/store", tmp_path)
    with pytest.raises(UserError, match="is too large to be a run's"):
        remote.open()
    remote.close()


def failing_job(argv, steps):
    """A run whose store takes no file of the checkpoints of these steps. The failures
    that it ends with.
    """
    object_store.PAUSES_S = ()  # in this forked rank alone
    put = object_store.ObjectStore.put

    def fails(store, name, source):
        if any(f"step-{step:06d}" in name for step in steps):
            raise object_store.StoreError(f"{store.url}: no answer")
        put(store, name, source)

    object_store.ObjectStore.put = fails
    try:
        job(argv)
    except NonFatalFailure as failure:
        return with_urls(failure)
    except object_store.StoreError as error:
        return f"ended: {error}"
    return "nothing failed"


@pytest.mark.parametrize("more", ["--async_save false", "--async_save true"])
def test_a_save_that_fails_costs_that_save_alone(user, tmp_path, more):
    url = f"file://{tmp_path}/store/run"
    argv = user.flags(url, "--max_steps 7 --save_steps 2", more)
    for failure in run_ranks(2, failing_job, argv, [4]):
        assert "the run is done" in failure
        assert "no answer" in failure
        assert f"{url}/checkpoints/step-000007" in failure
    root = tmp_path / "store/run/checkpoints"
    steps = [path.name for path in complete_checkpoints(root)]
    assert steps == ["step-000002", "step-000006", "step-000007"]
    assert not (root / "step-000004").exists()


def unwilling_job(argv):
    """A run whose store takes nothing when it begins. The error of this rank."""
    RemoteFolder.begin = no_answer  # in this forked rank alone
    with pytest.raises(object_store.StoreError) as caught:
        job(argv)
    return str(caught.value)


def no_answer(*_, **__):
    raise object_store.StoreError("no answer")


def test_all_ranks_end_where_a_run_cannot_begin(user, tmp_path):
    argv = user.flags(f"file://{tmp_path}/store/run", "--max_steps 2")
    for error in run_ranks(2, unwilling_job, argv):
        assert "no answer" in error


def forgetful_job(argv):
    """A run whose store does not answer once, when old checkpoints are to be deleted."""
    has_all_files = manager.has_all_files
    fails = [object_store.StoreError("no answer")]

    def failing(storage, name):
        if fails and storage.linked("latest") == "step-000004":
            raise fails.pop()
        return has_all_files(storage, name)

    manager.has_all_files = failing
    return job(argv)["steps"], fails


def test_a_deletion_that_fails_costs_no_save_and_is_tried_again(user, tmp_path):
    url = f"file://{tmp_path}/store/run"
    argv = user.flags(url, "--max_steps 6 --save_steps 2 --save_total_limit 1")
    assert run_alone(forgetful_job, argv) == (6, [])
    root = tmp_path / "store/run/checkpoints"
    assert [path.name for path in complete_checkpoints(root)] == ["step-000006"]


def test_a_run_whose_last_save_fails_ends_with_the_checkpoint_before(user, tmp_path):
    url = f"file://{tmp_path}/store/run"
    argv = user.flags(url, "--max_steps 3 --save_steps 2")
    (failure,) = run_ranks(1, failing_job, argv, [3])
    assert failure.startswith("ended: ")
    root = tmp_path / "store/run/checkpoints"
    assert [path.name for path in complete_checkpoints(root)] == ["step-000002"]
    assert run(1, [*argv, *AUTO.split()])["steps"] == 3


def test_a_url_is_given_up_although_the_last_upload_fails(tmp_path, monkeypatch):
    remote = RemoteFolder(f"file://{tmp_path}/store", tmp_path)
    remote.open()
    (remote.folder / "run.yaml").write_text("x")
    remote.begin(overwrites=False)

    def fails(*_):
        raise object_store.StoreError("no answer")

    monkeypatch.setattr(object_store.ObjectStore, "put", fails)
    remote.close()
    assert list(tree(tmp_path / "store")) == ["run.yaml"]


def assert_same_from_urls(user, source, url, folder, reference, wrap=()):
    """A run of two ranks with model and text below `source` and all else at `url`, killed
    after step 3 and resumed from the URL of its checkpoint, is that on a disk: curve and
    checkpoints, but for the model's place. So is one on a disk that goes on from it, and
    what commands on a new machine make of it.
    """
    own = [word.replace(str(user.root), source) for word in user.flags(url, FLAGS)]
    argv = [*own, "--cache_dir", str(folder / "cache")]
    resume = "--resume_from_checkpoint"
    run_ranks(2, *wrap, interrupted_job, argv, 3)
    run_ranks(2, *wrap, job, [*argv, resume, f"{url}/checkpoints/latest"])
    stored = downloaded(url, folder / "run")
    assert curve(stored) == curve(reference)
    assert_equal_but_for_the_base(stored, reference)
    base = read_json(stored / "checkpoints/latest/base.json")["folder"]
    assert base == f"{source}/model"
    elsewhere = user.flags(folder / "elsewhere", FLAGS)
    step = f"{url}/checkpoints/step-000008"
    run_ranks(2, *wrap, job, [*elsewhere, resume, step])
    assert_equal_but_for_the_base(folder / "elsewhere", reference, "step-000009")

    def printed_by(*command):
        new = {**os.environ, "XDG_CACHE_HOME": str(folder / "new_machine")}
        done = called([sys.executable, "-m", "mora_ds", *command], env=new)
        assert done.returncode == 0, done.stderr
        return done.stdout

    merged = folder / "merged"
    text = printed_by(
        "export", "--checkpoint", url, "--output", str(merged), "--verify"
    )
    assert "verification passed" in text
    weights = "model.safetensors"
    of_run = (reference / "merged" / weights).read_bytes()
    assert (merged / weights).read_bytes() == of_run
    assert f"{source}/model" in (merged / "README.md").read_text()
    assert f"{url}/checkpoints/step-000009: good, latest" in printed_by("verify", url)


def assert_equal_but_for_the_base(folder, reference, name=""):
    contents = tree(folder / "checkpoints" / name)
    expected = tree(reference / "checkpoints" / name)
    assert contents.keys() == expected.keys()
    for file in contents:
        if Path(file).name not in ("base.json", "manifest.json"):
            assert contents[file] == expected[file], file


@pytest.mark.heavy(seconds=40)
def test_a_run_whose_inputs_are_at_urls_is_that_on_a_disk(user, reference, tmp_path):
    source = f"file://{user.root}"
    url = f"file://{tmp_path}/store/run"
    assert_same_from_urls(user, source, url, tmp_path, reference)


@pytest.mark.heavy(seconds=20)
def test_a_model_that_a_run_has_made_is_there_after_it(user, tmp_path):
    url = f"file://{tmp_path}/store/run"
    argv = user.flags(url, "--max_steps 3 --save_steps 2 --train_tokenizer_vocab 420")
    at = argv.index("--model_name_or_path")
    argv[at : at + 2] = ["--model_config", str(CONFIG)]
    run(1, [*argv, *EXPORT.split()])
    merged = tmp_path / "merged"
    export_merged(Path(local(url)), merged, verify=True)
    weights = "model.safetensors"
    of_run = (tmp_path / "store/run/merged" / weights).read_bytes()
    assert (merged / weights).read_bytes() == of_run
    assert run(1, [*argv, "--max_steps", "5", *AUTO.split()])["steps"] == 5


@pytest.fixture
def overwriting(tmp_path):
    """(a run that has overwritten the one in a store, the store). Killed processes have left
    something of both."""
    store = tmp_path / "store"
    remote = RemoteFolder(f"file://{store}", tmp_path)
    stale = remote.folder / "stale"
    run_file = "versions: {}\nresolved: {owns: [run.yaml, metrics.jsonl, merged]}\n"
    for path in (
        store / "run.yaml",
        store / "metrics.jsonl",
        store / "merged/a",
        stale,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_file)
    remote.open()
    assert not stale.exists()
    remote.begin(overwrites=True)
    yield remote, store
    remote.close()


def test_run_yaml_stays_until_there_is_another_one(overwriting, monkeypatch):
    """It says that the other names are a run's, whenever this one is killed."""
    remote, store = overwriting
    (store / "metrics.jsonl").touch()
    with monkeypatch.context() as patched:
        patched.setattr(object_store.ObjectStore, "put", None)
        with pytest.raises(TypeError):
            remote.begin(overwrites=True)
    assert set(tree(store)) == {"run.yaml", ".lock"}


RANK_0 = SimpleNamespace(run_on_rank0=lambda what, work, long: work())


def test_an_upload_has_logs_and_a_merged_model_in_place_of_the_one_before(overwriting):
    remote, store = overwriting
    logs = {"metrics.jsonl", "summary.json", "profile/rank-0"}
    written = {*logs, "tensorboard/events", "merged/new", "checkpoints/file"}
    for path in (store / "merged/old", *(remote.folder / name for name in written)):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    remote.upload(RANK_0, [], has_merged=True)
    assert set(tree(store)) == {*logs, "merged/new", "run.yaml", ".lock"}
    assert (store / "tensorboard/events").exists()


def test_a_run_that_has_lost_its_url_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "RENEWED_S", 0.05)
    # A renewal that has begun would take the lease back
    monkeypatch.setattr(object_store.ObjectStore, "write", lambda *_: None)
    remote = RemoteFolder(f"file://{tmp_path}/store", tmp_path)
    remote.open()
    remote.begin(overwrites=False)
    (tmp_path / "store/.lock").write_text("another process")
    for thread in threading.enumerate():
        if thread.name == "lease":
            thread.join(60)
    (remote.folder / "metrics.jsonl").touch()
    with pytest.raises(RunError, match="another one writes there now"):
        remote.upload(RANK_0, [])
    remote.close()
    assert set(tree(tmp_path / "store")) == {".lock"}
    # Later runs of this process write elsewhere
    object_store.confirm_leases()


# -- S3 --------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3, tmp_path):
    """The URL of a run in it."""
    yield f"{reach(s3.endpoint, tmp_path)}/run"
    s3.fault = None


def s3_job(endpoint, work, argv, *more):
    """One rank of a run that reaches the server. For `run_ranks`."""
    reach(endpoint, Path("/"))
    object_store.PAUSES_S = (0.1, 0.5)  # in this forked rank alone
    return work(argv, *more)


KILLS = 30


@pytest.mark.heavy(seconds=300)
@pytest.mark.timeout(1800)
def test_a_run_in_a_bucket_that_is_killed_thirty_times(
    user, reference, s3, bucket, tmp_path
):
    """The random moments are of a seed; the last runs end."""
    moments = random.Random(0)
    argv = user.flags(bucket, FLAGS, EXPORT, AUTO)
    killed = 0
    while killed < KILLS:
        _pipes, processes = start_ranks(2, s3_job, s3.endpoint, job, argv)
        processes[0].join(moments.uniform(1, 8))
        killed += processes[0].is_alive()
        victims = moments.choice([processes[:1], processes[1:], processes])
        end(victims)
        end(processes, patience_s=30)
    run_ranks(2, s3_job, s3.endpoint, job, argv)
    run_folder = downloaded(bucket, tmp_path / "run")
    assert_same_stored(run_folder, reference)
    assert_good(run_folder)


def at_sizes(worlds, argv_of, wrap):
    """A run that stops dead after step 3, 6 and so on, with another number of ranks each
    time.
    """
    for index, world in enumerate(worlds):
        argv = argv_of("--per_device_train_batch_size", 12 // world, AUTO)
        step = 3 * (index + 1)
        work = (interrupted_job, argv, step) if step < 9 else (job, argv)
        run_ranks(world, *wrap, *work)


@pytest.mark.heavy(seconds=60)
@pytest.mark.parametrize("worlds", [(2, 1, 3), (1, 3, 2)])
def test_resumes_at_other_numbers_of_ranks_are_those_on_a_disk(
    user, s3, bucket, tmp_path, worlds
):
    out = tmp_path / "out"
    at_sizes(worlds, lambda *more: user.flags(out, FLAGS, *more), ())
    to_bucket = (s3_job, s3.endpoint)
    at_sizes(worlds, lambda *more: user.flags(bucket, FLAGS, *more), to_bucket)
    folder = downloaded(bucket, tmp_path / "run")
    assert curve(folder) == curve(out)
    assert tree(folder / "checkpoints") == tree(out / "checkpoints")


@pytest.mark.heavy(seconds=40)
@pytest.mark.parametrize("fault", [flaky(5), slow(0.1)], ids=["flaky", "slow"])
def test_a_store_with_errors_that_pass_costs_nothing(
    user, reference, s3, bucket, tmp_path, fault
):
    """Nor are credentials in anything that the run has written."""
    s3.fault = fault
    run_ranks(2, s3_job, s3.endpoint, job, user.flags(bucket, FLAGS, EXPORT))
    s3.fault = None
    folder = downloaded(bucket, tmp_path / "run")
    assert_same_stored(folder, reference)
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.heavy(seconds=30)
def test_a_bucket_that_becomes_read_only_ends_the_run_with_complete_checkpoints(
    user, s3, bucket, tmp_path
):
    argv = user.flags(bucket, "--max_steps 6 --save_steps 2")
    s3.fault = read_only_from(2)
    reported = run_ranks(2, s3_job, s3.endpoint, refused, argv, True)
    s3.fault = None
    for kind, message in reported:
        assert kind == "StoreError"
        assert bucket in message
    folder = downloaded(bucket, tmp_path / "run")
    steps = [verdict.folder.name for verdict in verify(folder)]
    assert steps == ["step-000002"]
    assert_good(folder)
    s3_again = [*argv, *AUTO.split()]
    (summary, _) = run_ranks(2, s3_job, s3.endpoint, job, s3_again)
    assert summary["steps"] == 6


@pytest.mark.heavy(seconds=90)
@pytest.mark.timeout(900)
def test_a_run_from_bucket_to_bucket_is_that_on_a_disk(
    user, reference, s3, bucket, tmp_path
):
    """And no credentials are in anything that it has written."""
    source = f"{bucket}-inputs"
    for path in (user.model, user.train, user.held, user.other):
        target = f"{source}/{path.relative_to(user.root)}"
        fsspec.filesystem("s3").put(str(path), target, recursive=True)
    wrap = (s3_job, s3.endpoint)
    assert_same_from_urls(user, source, bucket, tmp_path, reference, wrap)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.heavy(seconds=30)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_token_files_in_a_bucket_is_that_on_a_disk(
    user, s3, bucket, tmp_path, kind
):
    """On two ranks, replayed, stopped and resumed."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    documents = tokens_of(load_tokenizer(user.model), user.texts())
    write_tokens(tokens, kind, documents)
    source = f"{bucket}-tokens"
    fsspec.filesystem("s3").put(f"{tokens}/", source, recursive=True)

    def argv(out, folder, cache):
        files = f"{folder}/*.{kind}"
        more = f"{MERGING} {AUTO} --train_files {files} --replay old={files}:0.25"
        return user.flags(out, more, "--cache_dir", tmp_path / cache)

    run(2, argv(tmp_path / "out", tokens, "cache"))
    own = argv(bucket, source, "cache_of_node")
    run_ranks(2, s3_job, s3.endpoint, interrupted_job, own, 3)
    run_ranks(2, s3_job, s3.endpoint, job, own)
    assert curve(downloaded(bucket, tmp_path / "run")) == curve(tmp_path / "out")


# -- Google's storage ------------------------------------------------------------------


@pytest.fixture
def google_endpoint(monkeypatch):
    with google_cloud_storage(monkeypatch) as endpoint:
        yield endpoint


def google_job(endpoint, work, argv, *more):
    """One rank of a run that reaches the emulator. For `run_ranks`."""
    os.environ["STORAGE_EMULATOR_HOST"] = endpoint
    return work(argv, *more)


@pytest.mark.heavy(seconds=60)
def test_a_run_in_google_cloud_storage_is_that_on_a_disk(
    user, reference, google_endpoint, tmp_path
):
    """And two runs cannot both hold its lease."""
    source = "gs://tests/inputs"
    url = "gs://tests/run"
    fsspec.filesystem("gs").put(str(user.root), source, recursive=True)
    wrap = (google_job, google_endpoint)
    assert_same_from_urls(user, source, url, tmp_path, reference, wrap)
    remote = RemoteFolder(url, tmp_path)
    remote.open()
    assert not object_store.ObjectStore(url).create(".lock", b"another run")
    remote.close()

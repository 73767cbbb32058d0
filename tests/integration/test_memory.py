"""The memory against a real FalkorDB, a real Redis and a fake model: nothing is lost, and nothing
is added twice.
"""

from __future__ import annotations

import json
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.fake_openai import LATE, Call, FakeOpenAI
from tests.memories import Rig, tls
from tests.servers import free_port, redis_server, until

pytestmark = pytest.mark.server


def add(rig: Rig, *texts: str) -> list[str]:
    """Queue memories through one process, in order, and return their IDs."""
    rows = [{"id": str(uuid.uuid4()), "text": text} for text in texts]
    done = rig.run("import", "-", "--json", given="".join(json.dumps(row) + "\n" for row in rows))
    assert done.output["imported"] == len(texts), done
    return [row["id"] for row in rows]


def entered(fake: FakeOpenAI) -> list[str]:
    """Return the texts that the model was asked about, in order."""
    asked = [body for body in fake.asked("/chat/completions") if body.get("response_format")]
    named = [
        body
        for body in asked
        if body["response_format"]["json_schema"]["name"] == "ExtractedEntities"
    ]
    return [
        body["messages"][-1]["content"].rpartition("<TEXT>\n")[2].partition("\n</TEXT>")[0]
        for body in named
    ]


def test_from_adding_to_forgetting(rig: Rig) -> None:
    added = rig.json("add", "Alice works at Acme in Paris.", "--about", "the user said")
    assert (added["state"], added["project"]) == ("queued", rig.env["MEMORY_PROJECT"])
    assert rig.json("status")["queue"]["waiting"] == 1
    (shown,) = rig.json("episodes")["episodes"]
    assert (shown["id"], shown["state"], shown["about"]) == (
        added["id"],
        "queued",
        "the user said",
    )

    assert rig.run("work", "--once").code == 0
    status = rig.json("status")
    assert (status["queue"]["waiting"], status["queue"]["dead"]) == (0, 0)
    assert status["graph"] == {"memories": 1, "entities": 3, "facts": 1}
    assert status["problems"] == []
    (fact,) = rig.json("search", "where does alice work?")["facts"]
    assert (fact["fact"], fact["memories"]) == ("Alice works at Acme in Paris.", [added["id"]])
    assert "Acme" in [
        entity["name"] for entity in rig.json("search", "acme", "--entities")["entities"]
    ]
    (shown,) = rig.json("episodes")["episodes"]
    assert shown["state"] == "ingested"

    assert rig.json("forget", added["id"])["forgot"] == "memory"
    assert rig.json("status")["graph"] == {"memories": 0, "entities": 0, "facts": 0}
    assert rig.json("search", "where does alice work?")["facts"] == []
    assert rig.run("forget", added["id"]).code == 66
    assert rig.run("forget", "Alice").code == 65


def test_what_others_say_too_is_not_forgotten(rig: Rig) -> None:
    first, second = add(rig, "Bob owns Redis.", "Bob owns Redis.")
    add(rig, "Bob knows Carol.")
    rig.run("work", "--once")
    assert rig.json("status")["graph"] == {"memories": 3, "entities": 3, "facts": 2}
    rig.run("forget", first)
    assert rig.json("status")["graph"] == {"memories": 2, "entities": 3, "facts": 2}
    (fact,) = [
        fact for fact in rig.json("search", "bob owns redis")["facts"] if "owns" in fact["fact"]
    ]
    assert fact["memories"] == [second]
    rig.run("forget", second)
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 2, "facts": 1}
    (entity,) = [
        each
        for each in rig.json("search", "carol", "--entities")["entities"]
        if each["name"] == "Carol"
    ]
    assert rig.json("forget", entity["id"])["forgot"] == "entity"
    assert rig.json("forget", "--everything")["graph"]
    assert rig.json("status")["graph"]["memories"] == 0


def test_what_is_forgotten_is_in_no_summary(rig: Rig) -> None:
    (first,) = add(rig, "Bob owns Redis.")
    add(rig, "Bob knows Carol.", "Bob owns Vim.")
    rig.run("work", "--once")
    everything = "'Bob owns Redis. Bob knows Carol. Bob owns Vim.'"
    query = f"MATCH (n:Entity {{name: 'Bob'}}) SET n.summary = {everything}"
    rig.redis("FALKORDB", "GRAPH.QUERY", rig.env["MEMORY_PROJECT"], query)

    def summary() -> str:
        found = rig.json("search", "bob", "--entities")["entities"]
        return next(str(each["summary"]) for each in found if each["name"] == "Bob")

    rig.run("forget", first)
    left = sorted(sentence.strip() for sentence in summary().split(".") if sentence.strip())
    assert left == ["Bob knows Carol", "Bob owns Vim"]
    (fact,) = [
        each for each in rig.json("search", "carol")["facts"] if each["fact"] == "Bob knows Carol."
    ]
    assert rig.json("forget", fact["id"])["forgot"] == "fact"
    assert summary().strip() == "Bob owns Vim."


def test_that_nobody_ingests_is_a_problem(rig: Rig) -> None:
    add(rig, "Frank likes Tea.")
    assert rig.json("status")["problems"] == []
    words = ("id", str(uuid.uuid4()), "text", "Ivan waits.", "at", "2026-01-01T00:00:00+00:00")
    rig.redis("VALKEY", "DEL", rig.key("queue"))
    rig.redis("VALKEY", "XADD", rig.key("queue"), "1-1", *words)
    (problem,) = rig.json("status")["problems"]
    assert problem.startswith("memories wait: 1,")
    assert "no worker runs" in problem


def test_everything_that_was_forgotten_can_be_imported_again(rig: Rig) -> None:
    (first,) = add(rig, "Frank likes Tea.")
    rig.run("work", "--once")
    add(rig, "Heidi waits.")
    exported = rig.run("export").stdout
    assert rig.run("import", "-", "--json", given=exported).output["known"] == 2
    assert rig.json("forget", "--everything")["graph"]
    assert rig.run("import", "-", "--json", given=exported).output["imported"] == 2
    rig.run("work", "--once")
    assert rig.run("export").stdout == exported
    rig.run("forget", first)
    assert rig.json("add", "Frank likes Tea.", "--id", first)["state"] == "queued"


def test_a_fact_that_holds_no_longer_says_until_when(rig: Rig) -> None:
    add(rig, "Dave leads Team5", "Dave leads Team5 no longer")
    rig.run("work", "--once")
    facts = {fact["fact"]: fact for fact in rig.json("search", "dave team5")["facts"]}
    assert set(facts) == {"Dave leads Team5", "Dave leads Team5 no longer"}


def test_memories_are_ingested_in_order_and_projects_beside_each_other(
    rig: Rig, fake: FakeOpenAI
) -> None:
    texts = [f"Step{number} follows Start." for number in range(8)]
    fake.fail(
        LATE, after=0.1, times=0, path="/chat/completions", holding="Step"
    )  # long enough for all workers to come
    add(rig, *texts)
    other = {**rig.env, "MEMORY_PROJECT": f"{rig.env['MEMORY_PROJECT']}-other"}
    apart = Rig(rig.python, rig.cwd, other)
    hanging = fake.fail(200, after=60, times=0, holding="Stuck1")
    add(apart, "Stuck1 waits.")
    workers = [rig.start("work") for _ in range(3)]
    until(lambda: rig.waiting() == 0, "a project is ingested while another one's model hangs")
    assert [text for text in entered(fake) if "Step" in text] == texts, (
        "each once, in order, whoever did it"
    )
    assert rig.texts() == texts
    fake.lift(hanging)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert [worker.wait(20) for worker in workers] == [0, 0, 0]


def test_the_same_memory_is_added_once(rig: Rig, fake: FakeOpenAI) -> None:
    (known,) = add(rig, "Erin writes Rust.")
    assert rig.json("add", "Erin writes Rust.", "--id", known)["state"] == "already known"
    rig.run("work", "--once")
    # An entry that comes again after its memory is in the graph: what a worker that is killed
    # before its XACK leaves.
    words = (
        "id",
        known,
        "text",
        "Erin writes Rust.",
        "at",
        "2026-01-01T00:00:00+00:00",
        "about",
        "",
    )
    rig.redis("VALKEY", "XADD", rig.key("queue"), "*", *words)
    rig.run("work", "--once")
    assert entered(fake) == ["Erin writes Rust."], "the model is asked once"
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 2, "facts": 1}
    exported = rig.run("export").stdout
    assert rig.run("import", "-", "--json", given=exported).output["known"] == 1
    rig.run("work", "--once")
    assert rig.run("export").stdout == exported


def test_export_and_import_move_a_memory(rig: Rig) -> None:
    add(rig, "Frank likes Tea.", "Grace likes Coffee.")
    rig.run("work", "--once")
    add(rig, "Heidi waits.")
    exported = rig.run("export").stdout
    assert [json.loads(line)["text"] for line in exported.splitlines()] == rig.texts()
    other = {"MEMORY_PROJECT": f"{rig.env['MEMORY_PROJECT']}-moved"}
    assert rig.run("import", "-", "--json", given=exported, **other).output["imported"] == 3
    rig.run("work", "--once", **other)
    assert rig.run("export", **other).stdout == exported
    broken = rig.run("import", "-", given=exported + "{")
    assert (broken.code, "line 4" in broken.stderr) == (65, True)


OUTAGES: dict[str, dict[str, Any]] = {
    "rate limit": {"status": 429, "headers": {"Retry-After-Ms": "5"}},
    "wrong key": {"status": 401},
    "no such model": {"status": 404},
    "a setting that no request may have": {"status": 400, "path": "/chat/completions"},
    "out of order": {"status": 503, "headers": {"Retry-After-Ms": "5"}},
    "hangs up": {"status": 0},
    "embeddings": {"status": 500, "path": "/embeddings", "headers": {"Retry-After-Ms": "5"}},
}


def test_thoughts_and_prose_around_json_and_the_longest_answer(rig: Rig, fake: FakeOpenAI) -> None:
    fake.around = (
        "<think>Is it {this} or [that]?</think>\nHere it is {sic}:\n```json\n%s\n```\nDone."
    )
    add(rig, "Uma met Victor.")
    assert rig.run("work", "--once", MEMORY_MAX_TOKENS="900", MEMORY_MODEL_API="chat").code == 0
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 2, "facts": 1}
    assert {body["max_tokens"] for body in fake.asked("/chat/completions")} == {900}


def test_a_model_that_is_out_costs_nothing(rig: Rig, fake: FakeOpenAI) -> None:
    rig.start("work", pipe=subprocess.DEVNULL, MEMORY_ATTEMPTS="1")
    texts: list[str] = []
    for name, how in OUTAGES.items():
        outage = fake.fail(times=0, **how)
        added = [f"Ivan{len(texts)} met Judy{len(texts)}.", f"Judy{len(texts)} met Ken."]
        add(rig, *added)

        def tried_twice() -> bool:  # once would do for a dead letter
            tries = rig.redis("VALKEY", "HGETALL", rig.key("tries"))
            return "2" in [
                count
                for entry, count in zip(tries[::2], tries[1::2], strict=True)
                if "failed" in entry
            ]

        until(tried_twice, f"it is tried again: {name}")
        assert "Error" in until(
            lambda: rig.redis("VALKEY", "GET", rig.key("pause")), f"the queue says why: {name}"
        )
        assert (rig.waiting(), rig.redis("VALKEY", "XLEN", rig.key("dead"))) == (2, 0), name
        fake.lift(outage)
        texts += added
        until(lambda: rig.waiting() == 0, f"what waited is ingested: {name}")
    assert rig.texts() == texts
    assert rig.json("status")["graph"]["facts"] == len(texts)
    assert rig.redis("VALKEY", "EXISTS", rig.key("tries")) == 0, "nothing of it is left"


@pytest.mark.parametrize("status", [400, 500])
def test_what_cannot_be_ingested_is_a_dead_letter(rig: Rig, fake: FakeOpenAI, status: int) -> None:
    poison = fake.fail(status, times=0, holding="Poison", headers={"Retry-After-Ms": "5"})
    ids = add(rig, "Leo drinks Milk.", "Mia drinks Poison.", "Nina drinks Water.")
    rig.run("work", "--once", MEMORY_ATTEMPTS="2")
    (dead,) = rig.json("dead")["dead"]
    assert (dead["id"], dead["text"]) == (ids[1], "Mia drinks Poison.")
    assert str(status) in dead["reason"]
    assert rig.json("status")["problems"] == ["1 dead letters: run memory dead"]
    assert rig.json("status")["graph"]["facts"] == 2
    assert rig.run("status").code == 1
    assert rig.run("retry", str(uuid.uuid4())).code == 66
    fake.lift(poison)
    assert rig.json("retry")["retried"] == [ids[1]]
    rig.run("work", "--once")
    assert rig.json("dead")["dead"] == []
    assert rig.json("status")["graph"]["facts"] == 3
    assert sorted(rig.texts()) == ["Leo drinks Milk.", "Mia drinks Poison.", "Nina drinks Water."]


def test_a_memory_that_ends_its_workers_is_a_dead_letter(rig: Rig, fake: FakeOpenAI) -> None:
    fake.fail(200, after=60, times=0, holding="Oscar")
    add(rig, "Oscar kills Workers.", "Peggy lives.")
    worker = rig.start("work", MEMORY_LEASE="0.5")
    until(lambda: rig.count("Episodic"), "the worker is in the middle")
    worker.kill()
    worker.wait()
    entry = rig.redis("VALKEY", "XRANGE", rig.key("queue"), "-", "+")[0][0]
    rig.redis("VALKEY", "HSET", rig.key("tries"), f"{entry}:died", "10")
    rig.run("work", "--once")
    (dead,) = rig.json("dead")["dead"]
    assert "workers died" in dead["reason"]
    assert rig.json("status")["graph"]["memories"] == 2, (
        "the one in the middle is there, as what it was: pending"
    )
    assert {row["state"] for row in rig.json("episodes")["episodes"]} == {"dead letter", "ingested"}


def test_a_worker_that_is_killed_in_the_middle_leaves_nothing_half_done(
    rig: Rig, fake: FakeOpenAI
) -> None:
    hanging = fake.fail(200, after=60, times=0, path="/embeddings", holding="Quinn")
    (known,) = add(rig, "Quinn met Rita.")
    worker = rig.start("work")
    until(lambda: rig.count("Episodic"), "the worker has claimed it")
    worker.kill()
    worker.wait()
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 0, "facts": 0}
    assert rig.json("episodes")["episodes"][0]["state"] == "queued"
    fake.lift(hanging)
    rig.run("work", "--once")
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 2, "facts": 1}
    assert rig.json("episodes")["episodes"][0]["id"] == known


def test_a_worker_that_was_stopped_and_comes_back_writes_nothing(
    rig: Rig, fake: FakeOpenAI
) -> None:
    slow = fake.fail(200, after=1.5, times=0, path="/embeddings", holding="Sybil")
    add(rig, "Sybil met Trent.")
    worker = rig.start("work", MEMORY_LEASE="0.5")
    until(lambda: rig.count("Episodic"), "the worker has claimed it")
    worker.send_signal(signal.SIGSTOP)
    fake.lift(slow)
    rig.run("work", "--once", MEMORY_LEASE="0.5")
    done = {"memories": 1, "entities": 2, "facts": 1}
    assert rig.json("status")["graph"] == done
    worker.send_signal(signal.SIGCONT)
    (_,) = add(rig, "Uma met Victor.")
    until(lambda: rig.waiting() == 0, "the one that came back works on")
    assert rig.json("status")["graph"] == {"memories": 2, "entities": 4, "facts": 2}


def test_what_is_forgotten_while_it_is_ingested_stays_forgotten(rig: Rig, fake: FakeOpenAI) -> None:
    slow = fake.fail(500, after=60, times=0, path="/embeddings", holding="Walter")
    first, _ = add(rig, "Walter met Xenia.", "Yves met Zoe.")
    rig.start("work")
    until(lambda: rig.count("Episodic"), "the worker has claimed it")
    assert rig.json("forget", first)["forgot"] == "memory"
    fake.lift(slow)
    fake.over.set()
    until(lambda: rig.waiting() == 0, "the worker goes on")
    assert rig.texts() == ["Yves met Zoe."]
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 2, "facts": 1}


def test_without_valkey_memories_are_ingested_at_once(rig: Rig, fake: FakeOpenAI) -> None:
    nowhere = {"VALKEY_PORT": str(free_port())}
    added = rig.json("add", "Anna met Bert.", **nowhere)
    assert added["state"] == "ingested"
    assert "without a queue: Valkey" in added["note"]
    assert "VALKEY_HOST" in added["note"]
    assert rig.json("search", "anna", **nowhere)["facts"]
    assert rig.json("episodes", **nowhere)["episodes"][0]["id"] == added["id"]
    assert rig.json("forget", added["id"], **nowhere)["forgot"] == "memory"
    for command in (["dead"], ["retry"], ["work", "--once"]):
        done = rig.run(*command, **nowhere)
        assert (done.code, "VALKEY_HOST" in done.stderr) == (69, True)
    fake.fail(400, times=0)
    lost = rig.run("add", "Carl met Dora.", **nowhere)
    assert (lost.code, "the memory was not stored" in lost.stderr) == (69, True)


def test_what_is_missing_is_said_with_the_variable_that_sets_it(
    rig: Rig, python: str, tmp_path: Path
) -> None:
    nowhere = {"FALKORDB_PORT": str(free_port()), "VALKEY_PORT": str(free_port())}
    for words in (
        ["search", "x"],
        ["episodes"],
        ["export"],
        ["forget", str(uuid.uuid4())],
        ["forget", "--everything"],
    ):
        done = rig.run(*words, **nowhere)
        assert (done.code, "FALKORDB_HOST" in done.stderr) == (69, True), done
    alone = Rig.of(python, tmp_path, None, graph=1, queue=1, project="alone")
    done = alone.run("add", "Ed met Flo.")
    assert done.code == 69
    assert all(
        name in done.stderr
        for name in ("VALKEY_HOST", "OPENAI_API_KEY", "the memory was not stored")
    )
    problems = " ".join(alone.json("status")["problems"])
    assert all(name in problems for name in ("VALKEY_HOST", "FALKORDB_HOST", "OPENAI_API_KEY"))
    kept_anyway = rig.json("add", "Ed met Flo.", OPENAI_API_KEY="", OPENAI_BASE_URL="")
    assert kept_anyway["state"] == "queued"
    assert "OPENAI_API_KEY" in kept_anyway["note"]
    assert rig.run("work", OPENAI_API_KEY="", OPENAI_BASE_URL="").code == 69
    rig.run("work", "--once")
    said = rig.json("search", "ed flo", OPENAI_API_KEY="", OPENAI_BASE_URL="")
    assert said["facts"]
    assert "words alone" in said["note"]


@pytest.mark.parametrize(
    ("words", "env", "code", "sentence"),
    [
        ([], {}, 64, "usage"),
        (["add"], {}, 64, "usage"),
        (["add", "  "], {}, 65, "empty"),
        (["add", "-"], {}, 65, "empty"),
        (["add", "x", "--at", "yesterday"], {}, 65, "ISO 8601"),
        (["add", "x", "--id", "5"], {}, 65, "UUID"),
        (["import", "/nowhere"], {}, 65, "/nowhere"),
        (["status"], {"FALKORDB_PORT": "tcp://10.0.0.1:6379"}, 78, "FALKORDB_PORT"),
        (["search", "x", "--limit", "0"], {}, 64, "number from 1 to"),
        (["status"], {"MEMORY_WORKERS": "many"}, 78, "MEMORY_WORKERS"),
        (["status"], {"MEMORY_PROJECT": "a b"}, 78, "MEMORY_PROJECT"),
        (["status"], {"MEMORY_MODEL_API": "telepathy"}, 78, "MEMORY_MODEL_API"),
    ],
)
def test_mistakes_have_a_sentence_and_a_code(
    rig: Rig, words: list[str], env: dict[str, str], code: int, sentence: str
) -> None:
    done = rig.run(*words, **env)
    assert (done.code, sentence in done.stderr) == (code, True), done


def test_a_server_that_is_no_falkordb_is_named_and_costs_nothing(rig: Rig) -> None:
    add(rig, "Zed met Abe.")
    rig.start(
        "work", pipe=subprocess.DEVNULL, FALKORDB_PORT=rig.env["VALKEY_PORT"], MEMORY_ATTEMPTS="1"
    )
    said = until(
        lambda: rig.redis("VALKEY", "GET", rig.key("pause")), "the queue says why it rests"
    )
    assert "without FalkorDB's graph module" in said
    assert (rig.waiting(), rig.redis("VALKEY", "XLEN", rig.key("dead"))) == (1, 0)
    done = rig.run("search", "x", FALKORDB_PORT=rig.env["VALKEY_PORT"])
    assert (done.code, "FALKORDB_PORT" in done.stderr) == (69, True)


def test_tls_is_spoken_and_the_certificate_is_checked(rig: Rig, tmp_path: Path) -> None:
    words = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "ca.pem")]
    subprocess.run(["openssl", *words, *names, *files], check=True, capture_output=True)
    with (
        tls(tmp_path, int(rig.env["FALKORDB_PORT"])) as graph,
        tls(tmp_path, int(rig.env["VALKEY_PORT"])) as queue,
    ):
        env = {"FALKORDB_HOST": "localhost", "FALKORDB_PORT": str(graph), "FALKORDB_TLS": "true"}
        env |= {"VALKEY_HOST": "localhost", "VALKEY_PORT": str(queue), "VALKEY_TLS": "1"}
        trusted = {**env, "SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        assert rig.json("add", "Bea met Cal.", **trusted)["state"] == "queued"
        rig.run("work", "--once", **trusted)
        assert rig.json("search", "bea", **trusted)["facts"]
        assert len(rig.json("status", **env)["problems"]) == 2, (
            "nobody vouches for that certificate"
        )
        by_address = {**trusted, "FALKORDB_HOST": "127.0.0.1", "VALKEY_HOST": "127.0.0.1"}
        assert len(rig.json("status", **by_address)["problems"]) == 2, "it is for another name"


@pytest.mark.parametrize("api", ["responses", "json"])
def test_other_ways_to_ask_a_model(rig: Rig, fake: FakeOpenAI, api: str) -> None:
    add(rig, "Gus met Hal.")
    rig.run("work", "--once", MEMORY_MODEL_API=api)
    assert rig.json("status")["graph"] == {"memories": 1, "entities": 2, "facts": 1}
    assert bool(fake.asked("/responses")) == (api == "responses")


def test_passwords_are_asked_for_and_not_shown(
    python: str, fake: FakeOpenAI, tmp_path: Path
) -> None:
    secret = 'hunt"er\\ 2'  # noqa: S105 -- of servers that a test makes
    with redis_server(graph=True, password=secret) as graph, redis_server(password=secret) as queue:
        rig = Rig.of(python, tmp_path, fake, graph=graph, queue=queue, project="locked")
        for password in ("", "wrong-hunter"):
            said = rig.json("status", FALKORDB_PASSWORD=password, VALKEY_PASSWORD=password)
            problems = [problem for problem in said["problems"] if "hunt" not in problem]
            assert [
                "FALKORDB_PASSWORD" in problem or "VALKEY_PASSWORD" in problem
                for problem in problems
            ] == [
                True,
                True,
            ]
        env = {"FALKORDB_PASSWORD": secret, "VALKEY_PASSWORD": secret}
        rig.json("add", "Ian met Jo.", **env)
        assert rig.run("work", "--once", **env).code == 0
        said = rig.json("status", **env)
        assert said["graph"]["facts"] == 1
        assert [problem.partition(" ")[0] for problem in said["problems"]] == [
            "Valkey",
            "FalkorDB",
        ], "neither keeps it"


def test_each_project_has_a_memory_of_its_own(rig: Rig, tmp_path: Path) -> None:
    rig.env.pop("MEMORY_PROJECT")
    names = {}
    for name, origin in {
        "plain": "",
        "one": "https://me:secret@host/Owner/name.git",
        "two": "git@host:owner/name",
        "three": "https://host/o/x",
    }.items():
        rig.cwd = tmp_path / name / "below" if origin else tmp_path / name
        rig.cwd.mkdir(parents=True)
        if origin:
            (tmp_path / name / ".git").mkdir()
            (tmp_path / name / ".git/config").write_text(
                f'[core]\nrepositoryformatversion = 0\n[remote "origin"]\nurl = {origin}\n'
            )
            (tmp_path / name / ".git/HEAD").write_text("ref: refs/heads/main\n")
            for part in ("objects", "refs"):
                (tmp_path / name / ".git" / part).mkdir()
        names[name] = rig.json("status")["project"]
    assert names["one"] == names["two"], "one project, however it is cloned"
    assert names["one"].startswith("name_")
    assert names["plain"].startswith("plain_")
    assert len(set(names.values())) == 3
    assert rig.json("status", "--project", "chosen")["project"] == "chosen"


def test_the_fake_refuses_what_is_malformed(fake: FakeOpenAI) -> None:
    import requests

    def post(path: str, body: dict[str, Any], key: str = fake.key) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return requests.post(
            f"{fake.url}/{path}", json={"model": "m", **body}, headers=headers, timeout=10
        ).status_code

    user = {"role": "user", "content": "hi"}
    assert post("chat/completions", {"messages": [user]}) == 200
    assert post("chat/completions", {"messages": [user]}, "other") == 401
    assert post("chat/completions", {"messages": []}) == 400
    assert (
        post(
            "chat/completions", {"messages": [{"role": "tool", "tool_call_id": "1", "content": ""}]}
        )
        == 400
    )
    assert post("embeddings", {"input": ["", "x"]}) == 400
    assert post("nothing", {}) == 404
    fake.reply = lambda _messages, _tools: Call("nowhere", {})
    assert post("chat/completions", {"messages": [user]}) == 400
    assert len(fake.wrong) == 4
    fake.wrong.clear()

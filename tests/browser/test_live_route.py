"""The live route of a real server against strangers: hostile numbers, bombs, bursts, desertions."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
import pytest
from host.texts import english

HANG = 20
"""Seconds after which an answer counts as none, on a busy machine."""
JSON = {"Content-Type": "application/json"}
SAMPLING = {
    "timestep_sampling": "qinglong_flux",
    "timestep_sampling.logit_mean": -6.0,
    "timestep_sampling.logit_std": 2.0,
    "timestep_sampling.mid_ratio": 0.8,
    "timestep_sampling.logsnr_ratio": 0.075,
    "timestep_sampling.logsnr2_ratio": 0.125,
    "timestep_sampling.sigmoid_scale": 1.0,
    "timestep_sampling.weighting_scheme": "none",
    "min_timestep": 10,
    "max_timestep": 990,
    "preserve_distribution_shape": True,
    "num_timestep_buckets": 8,
}
METHODS = {
    "sigma_rel": {"method.sigma_rel": 0.2},
    "sigma_rel_musubi": {"method.sigma_rel": 0.2},
    "beta": {"method.beta": 0.9},
    "beta_ramp": {"method.beta": 0.9, "method.beta2": 0.95},
}


def node(node_id, values, **inputs):
    return {"node_id": node_id, "values": values, "inputs": inputs}


def preview(**values):
    default = {"width": 1024, "height": 1024, "bins": 50, "samples": 100_000, "seed": 0}
    sampling = node("BraidTimestepSampling", SAMPLING)
    return "timesteps", node("BraidTimestepPreview", default | values, timesteps=sampling)


def planned_run(steps, method="sigma_rel", every=1):
    """Post-Hoc EMA behind a training that is not done yet."""
    values = {"method": method, "sort": "step", "first": 1, "last": 0} | METHODS[method]
    saving = node("BraidCheckpointing", {"save_every_n_steps": every, "save_last_n": 0})
    train = node("BraidTrainLora", {"steps": steps}, options=saving)
    return "ema", node("BraidPostHocEma", values, checkpoints=train)


def cache(node_id="BraidMagCachePlan", ratios="0", **values):
    rule = {"threshold": 10.0, "retention_ratio": 0.0, "k": 32, "interpolation": "cumulative"}
    default = {"preset": "FLUX.1-dev", "mag_ratios": ratios, "rule": "magcache"}
    default |= {f"rule.{name}": value for name, value in rule.items()}
    return "magcache", node(node_id, default | values)


def folder(path, pattern="*.safetensors"):
    values = {"method": "sigma_rel", "sort": "step", "first": 1, "last": 0} | METHODS["sigma_rel"]
    load = node("BraidLoadCheckpoints", {"folder": ".", "pattern": pattern, "path": path})
    return "ema", node("BraidPostHocEma", values, checkpoints=load)


def ask(server, noun, body, headers=JSON):
    """(status, answer) of one question; the body as bytes, or what becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=HANG)
    try:
        connection.request("POST", f"/braid/live/{noun}", data, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


REFUSED = {
    "samples": (preview(samples=10**9), "samples is 1000000000; it must be a whole number between"),
    "no samples": (preview(samples=0), "samples is 0"),
    "bins": (preview(bins=10**9), "bins is 1000000000"),
    "a huge number": (preview(samples=10**4000), "samples is 1000"),
    "a number as a list": (preview(samples=[5]), "samples is"),
    "text for a number": (preview(samples="many"), "samples is 'many'"),
    "steps": (planned_run(20_000_000), "steps is 20000000"),
    "fewer than no steps": (planned_run(-5), "steps is -5"),
    "steps of a plan": (cache(steps=10**6), "steps is 1000000"),
    "steps below none of a plan": (cache(steps=-5), "steps is -5"),
    "steps of the sampler": (cache("BraidMagCache", steps_downstream=10**9), "steps_downstream is"),
    "k": (cache(steps=28, **{"rule.k": 10**9}), "k is 1000000000"),
    "an unknown preset": (cache(steps=28, preset="x" * 5000), "preset is 'xxx"),
    "an unknown rule": (cache(steps=28, rule={"a": []}), "rule is {'a': []}; choose one of"),
    "very many ratios": (cache(steps=28, ratios="1," * 20_000), "20000 values in one line"),
    "a long text": (cache(steps=28, ratios="1" * 200_000), "must be text"),
    "a missing value": (("timesteps", node("BraidTimestepSampling", {})), "is missing"),
    "another machine": (folder("//host/share"), "names another machine or a device"),
    "another machine, as Windows says": (folder("\\\\host\\share"), "names another machine"),
    "a device of Windows": (folder("\\\\.\\pipe\\x"), "names another machine or a device"),
    "a device": (folder("/dev/fd"), "leads to /dev/fd, a device"),
    "the processes": (folder("/proc/self", "**/*"), "leads to /proc/self, a device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_queue_would_refuse_is_one_sentence(server, name):
    question, sentence = REFUSED[name]
    status, answer = ask(server, *question)
    assert status == 200 and set(answer) == {"error"}
    error = english(answer["error"])
    assert sentence in error and "\n" not in error and len(error) <= 1000


@pytest.mark.parametrize("method", METHODS)
def test_a_million_planned_checkpoints_are_a_thousand_bars_of_the_true_weights(server, method):
    status, answer = ask(server, *planned_run(1_000_000, method))
    assert status == 200 and answer["count"] == 1_000_000
    assert len(answer["weights"]) == 1000 == len(answer["files"]) == len(answer["borders"]) - 1
    assert sum(answer["weights"]) == pytest.approx(1)
    assert english(answer["files"][0]) == "step 1 to step 1000"
    assert english(answer["files"][-1]) == "step 999001 to step 1000000"
    assert answer["steps"][-1] == 1e6
    if method in ("sigma_rel", "sigma_rel_musubi"):
        assert answer["sigma_rel"] == pytest.approx(0.2, abs=1e-5)


def test_an_epoch_that_takes_long_is_drawn_in_part_and_says_so(server):
    status, answer = ask(server, *preview(samples=5_000_000, bins=1000))
    assert status == 200 and sum(answer["statistics"]["counts"]) == 200_000
    assert "200,000 of 5,000,000 items" in english(answer["subtitle"][-1])


def test_a_strip_of_ten_thousand_steps_is_a_sentence(server):
    status, answer = ask(server, *cache("BraidMagCache", steps_downstream=10_000))
    assert status == 200 and "too many to draw" in english(answer["message"])


@pytest.mark.parametrize(
    "path, pattern",
    [("/", "**/*.safetensors"), ("/etc", "*"), ("~", "*"), ("../../..", "*"), ("/nowhere", "*")],
)
def test_a_folder_elsewhere_waits_for_the_run(server, path, pattern):
    status, answer = ask(server, *folder(path, pattern))
    assert status == 200 and "run the graph to see them here" in english(answer["message"])


def nested(depth):
    """So many loaders behind one another, as text: Python's own writer would not."""
    start, end = '{"node_id": "BraidPostHocEma", "values": {}, "inputs": {"checkpoints": ', "}}"
    return (start * depth + "null" + end * depth).encode()


GOOD = json.dumps(preview()[1]).encode()
MALFORMED = {
    "a million brackets": (b"[" * 1_000_000, JSON, 400),
    "a million braces": (b'{"a":' * 200_000, JSON, 400),
    "three thousand nodes": (nested(3000), JSON, 400),
    "forty nodes": (nested(40), JSON, 400),
    "not UTF-8": (GOOD.replace(b"width", b"wi\xffth"), JSON, 400),
    "UTF-16": (GOOD.decode().encode("utf-16"), JSON, 400),
    "NaN": (GOOD.replace(b"50", b"NaN"), JSON, 400),
    "Infinity": (GOOD.replace(b"50", b"-Infinity"), JSON, 400),
    "a number of five thousand digits": (GOOD.replace(b"50", b"9" * 5000), JSON, 400),
    "a key twice": (GOOD.replace(b'"width"', b'"height"'), JSON, 400),
    "nothing": (b"", JSON, 400),
    "null": (b"null", JSON, 400),
    "a list": (b"[]", JSON, 400),
    "a number": (b"1", JSON, 400),
    "no values": (b'{"node_id": "BraidTimestepPreview"}', JSON, 400),
    "values in a list": (
        b'{"node_id": "BraidTimestepPreview", "values": [], "inputs": {}}',
        JSON,
        400,
    ),
    "a node of nobody": (b'{"node_id": "KSampler", "values": {}, "inputs": {}}', JSON, 400),
    "a node without this chart": (GOOD.replace(b"Preview", b"Sampling1", 1), JSON, 400),
    "another type": (GOOD, {"Content-Type": "text/plain"}, 415),
    "no type": (GOOD, {}, 415),
    "not encoded as it says": (GOOD, JSON | {"Content-Encoding": "gzip"}, 400),
    "very long": (GOOD + b" " * 2_000_000, JSON, 413),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_question_is_refused_in_one_sentence(server, name):
    body, headers, expected = MALFORMED[name]
    status, answer = ask(server, "timesteps", body, headers)
    assert status == expected and set(answer) == {"error"}
    assert answer["error"] and "\n" not in answer["error"] and len(answer["error"]) <= 1000


def test_an_unknown_chart_names_the_known_ones(server):
    status, answer = ask(server, "x" * 500, GOOD)
    assert status == 404 and answer["error"].endswith("known: ema, magcache, timesteps")


def test_a_linked_node_of_another_pack_is_what_only_a_run_can_know(server):
    noun, body = preview()
    body["inputs"]["timesteps"]["node_id"] = "BraidOfAnotherPack"
    message = english(ask(server, noun, body)[1]["message"])
    assert "timesteps comes from a linked node" in message


def test_what_other_extensions_put_into_a_node_is_not_asked_for(server):
    noun, body = preview(control_after_generate="fixed", **{"$$canvas-preview": {"a": [1]}})
    body["inputs"]["loss_map"] = None
    assert "statistics" in ask(server, noun, body)[1]


EXPENSIVE = [
    preview(samples=5_000_000, bins=1000),
    planned_run(1_000_000, "sigma_rel_musubi"),
    planned_run(1_000_000),
    cache(steps=1000),
    ("timesteps", b"[" * 1_000_000),
    ("ema", nested(3000)),
    preview(samples=10**9),
    folder("/", "**/*.safetensors"),
]


def timed(call, *arguments):
    started = time.monotonic()
    return call(*arguments), time.monotonic() - started


def test_a_burst_leaves_the_server_answering_others_and_its_memory_as_it_was(server):
    process = psutil.Process(server.process.pid)
    for question in EXPENSIVE:  # what a first call loads stays
        ask(server, *question)
    before, seconds = process.memory_info().rss, []
    with ThreadPoolExecutor(8) as clients:
        burst = [clients.submit(ask, server, *question) for question in EXPENSIVE * 2]
        while not all(each.done() for each in burst):
            seconds.append(timed(server.get, "/system_stats")[1])
    assert all(each.result()[0] in (200, 400) for each in burst)
    assert max(seconds) < HANG and sorted(seconds)[len(seconds) // 2] < 1
    assert process.memory_info().rss - before < 300e6


def send_and_leave(server, noun, body):
    address = urlsplit(server.url)
    data = json.dumps(body).encode()
    head = f"POST /braid/live/{noun} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=HANG) as client:
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def test_a_client_that_leaves_leaves_no_work_behind(server):
    """Twenty questions of a third of a second each would keep the server busy for seconds."""
    process = psutil.Process(server.process.pid)
    for _ in range(20):
        send_and_leave(server, *planned_run(1_000_000, "sigma_rel_musubi"))
    status, answer = ask(server, *preview(samples=1000))
    assert status == 200 and "statistics" in answer
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        worked = process.cpu_times().user
        time.sleep(0.5)
        if process.cpu_times().user - worked < 0.1:
            break
    else:
        pytest.fail("the server still computes")


def test_of_one_panel_only_the_newest_question_is_answered(server):
    headers = JSON | {"Braid-Panel": "page 1"}
    answers, threads = {}, []
    for index in range(6):  # in this order, each while the one before is computed or waits
        noun, body = planned_run(1_000_000 - index, "sigma_rel_musubi")
        question = server, noun, body, headers
        thread = threading.Thread(target=lambda i=index, q=question: answers.update({i: ask(*q)}))
        thread.start()
        threads.append(thread)
        time.sleep(0.03)
    for thread in threads:
        thread.join()
    status, answer = answers[5]
    assert status == 200 and answer["count"] == 1_000_000 - 5
    overtaken = [answer for status, answer in answers.values() if status == 409]
    assert len(overtaken) >= 3 and all(each["again"] for each in overtaken)


def test_the_rows_of_the_front_end_are_the_servers(server):
    script = server.get_bytes("/extensions/My-Pack/extension.js").decode()
    table = script.split("const CHARTS = {")[1].split("};")[0]
    rows = [line for line in table.splitlines() if "noun:" in line]
    for row in rows:
        node_id, noun = row.split(":")[0].strip(), row.split('noun: "')[1].split('"')[0]
        answer = ask(server, noun, node(node_id, {}))
        assert answer[0] == 200, (node_id, answer)
    assert len(rows) == 5

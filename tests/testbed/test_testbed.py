"""The embedded default: legal paths, the chat format, the command line, and what the shipped checkpoints can do."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_opd.errors import InputError
from lit_opd.testbed import ASSETS, make_automaton, make_tokenizer, read_records, sample_problems
from lit_opd.testbed.__main__ import main
from lit_opd.testbed.accuracy import boxed_answer
from lit_opd.testbed.build import build, folder_bytes
from lit_opd.testbed.task import NUM_LEGAL, NUM_OPERATIONS, NUM_STATES, sample_problem
from lit_opd.testbed.tokenizer import prompt_ids
from lit_opd.testbed.warmup import make_model, supervised_batch, supervised_step

NUM_GRADED = 128


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def walk(automaton, prompt):
    """The codes a prompt visits, read from its text; None where an operation is illegal. An independent loop."""
    operations, start = prompt.split("=")
    state, visited = automaton.codes.index(start), []
    for begin in range(0, len(operations), 3):
        state = automaton.targets[state][automaton.words.index(operations[begin : begin + 3])]
        if state is None:
            return None
        visited.append(automaton.codes[state])
    return visited


@pytest.mark.parametrize("all_legal", [False, True])
@pytest.mark.parametrize("chain_length", [1, 6, 12, 24])
def test_paths_are_legal_and_the_response_follows_the_tables(all_legal, chain_length):
    automaton = make_automaton(all_legal=all_legal)
    for problem in sample_problems(automaton, count=50, seed=3, chain_length=chain_length):
        visited = walk(automaton, problem.prompt)
        assert visited is not None and len(visited) == chain_length
        assert problem.response == "".join(visited) + "\\boxed{" + visited[-1] + "}"
        assert problem.answer == visited[-1]


def test_states_and_operations_have_their_own_names():
    automaton = make_automaton()
    assert len(set(automaton.codes)) == NUM_STATES and all(re.fullmatch(r"\d{3}", code) for code in automaton.codes)
    assert len(set(automaton.words)) == NUM_OPERATIONS and all(re.fullmatch("[a-z]{3}", w) for w in automaton.words)


def test_the_control_makes_every_operation_legal_and_changes_no_legal_target():
    task, control = make_automaton(), make_automaton(all_legal=True)
    assert (task.codes, task.words) == (control.codes, control.words)
    for state in range(NUM_STATES):
        assert len(task.legal(state)) == NUM_LEGAL
        assert len(control.legal(state)) == NUM_OPERATIONS
        assert all(task.targets[state][op] == control.targets[state][op] for op in task.legal(state))


def test_the_control_samples_operations_that_are_illegal_in_the_task():
    prompts = [p.prompt for p in sample_problems(make_automaton(all_legal=True), count=50, seed=0)]
    assert sum(walk(make_automaton(), prompt) is None for prompt in prompts) > 45


def test_the_tables_are_the_ones_the_shipped_models_learned():
    # Pinned: a change here (another seed, another order of draws) makes the shipped checkpoints worthless.
    text = json.dumps(vars(make_automaton()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "fbaea6eca63ce315"


def test_problems_are_fixed_by_the_seed_and_all_different():
    automaton = make_automaton()
    first = sample_problems(automaton, count=300, seed=5)
    random.seed(0)  # the global stream has no say
    assert first[:100] == sample_problems(automaton, count=100, seed=5)
    assert set(first).isdisjoint(sample_problems(automaton, count=300, seed=6))
    assert len({problem.prompt for problem in first}) == 300


def test_short_chains_still_give_different_problems_and_too_many_are_refused():
    automaton = make_automaton()  # 100 states x 4 operations = 400 paths of length 1, of which half may be asked for
    assert len({p.prompt for p in sample_problems(automaton, count=200, seed=0, chain_length=1)}) == 200
    with pytest.raises(InputError, match=r"count.*1 to 200.*got 201"):
        sample_problems(automaton, count=201, seed=0, chain_length=1)
    with pytest.raises(InputError, match="chain_length"):
        sample_problem(automaton, random.Random(0), chain_length=0)


def test_prompt_and_response_have_the_stated_token_counts(tokenizer):
    for problem in sample_problems(make_automaton(), count=20, seed=1):
        assert len(tokenizer.encode(problem.prompt)) == 40  # 12 words x 3 + "=" + 3
        assert len(prompt_ids(tokenizer, problem.prompt)) == 41  # and the marker before it
        assert len(tokenizer.encode(problem.response)) + 1 == 42  # 12 codes x 3 + box + 3 + brace + end symbol


def test_every_code_is_equally_far_from_its_operation(tokenizer):
    problem = sample_problems(make_automaton(), count=1, seed=1)[0]
    ids = prompt_ids(tokenizer, problem.prompt) + tokenizer.encode(problem.response)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    for step, (word, code) in enumerate(zip(problem.words, problem.codes, strict=True)):
        begin = 1 + 3 * step
        assert "".join(tokens[begin : begin + 3]) == word
        assert "".join(tokens[begin + 40 : begin + 43]) == code


def test_text_survives_encoding_and_decoding(tokenizer):
    problem = sample_problems(make_automaton(), count=1, seed=2)[0]
    texts = [
        problem.prompt,
        problem.response,
        "a\\boxed{042}b \\boxed x , .\n\nZ",
        "\\boxed{\\boxed{1}}",
        " lead, trail ",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\\boxed{7}")) == ["\\boxed{", "7", "}"]


def test_the_template_renders_every_role_and_the_response_follows_directly(tokenizer):
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "abc=123"}]
    ask = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ask == "Be terse.<user>abc=123"
    told = [*messages, {"role": "assistant", "content": "456"}, messages[1]]
    assert tokenizer.apply_chat_template(told, tokenize=False) == ask + "456<eos><user>abc=123"


def test_special_tokens_are_distinct_and_padding_goes_left(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode([tokenizer.eos_token_id, *tokenizer.encode("1")], skip_special_tokens=True) == "1"


def test_supervision_is_the_prompt_then_the_response_and_the_end_symbol(tokenizer):
    problem = sample_problems(make_automaton(), count=1, seed=4)[0]
    prompts, responses = supervised_batch([problem], tokenizer)
    assert tokenizer.decode(prompts[0]) == f"<user>{problem.prompt}"
    assert tokenizer.decode(responses[0]) == problem.response + "<eos>"


def test_the_supervised_step_takes_the_mean_loss_of_the_response_tokens(tokenizer):
    prompts, responses = supervised_batch(sample_problems(make_automaton(), count=2, seed=4), tokenizer)
    model = make_model(16, tokenizer)
    with torch.no_grad():  # a slow loop: the logits before each response token, one token at a time
        logprobs = model(input_ids=torch.cat([prompts, responses], -1)).logits.log_softmax(-1)
    want = -sum(logprobs[row, 40 + t, responses[row, t]] for row in range(2) for t in range(42)) / 84
    loss = supervised_step(model, (prompts, responses), torch.optim.SGD(model.parameters(), lr=0.1), 1.0)
    torch.testing.assert_close(loss, want)
    assert supervised_step(model, (prompts, responses), torch.optim.SGD(model.parameters(), lr=0.1), 1.0) < loss


@pytest.mark.parametrize(
    ("text", "answer"),
    [("1\\boxed{042}", "042"), ("\\boxed{1}", None), ("\\boxed{123", None), ("123}", None)]
    + [("\\boxed{111}\\boxed{222}", "222"), ("", None)],
)
def test_the_last_whole_box_is_the_answer(text, answer):
    assert boxed_answer(text) == answer


def test_the_data_command_writes_what_it_says(tmp_path):
    out = tmp_path / "new" / "six.jsonl"
    main(["data", "--out", str(out), "--count", "30", "--seed", "9", "--chain-length", "6"])
    rows = read_records(out)
    assert [set(row) for row in rows] == [{"id", "prompt", "answer"}] * 30
    assert len({row["id"] for row in rows}) == 30
    assert all(len(row["prompt"]) == 22 and walk(make_automaton(), row["prompt"])[-1] == row["answer"] for row in rows)
    assert [path.name for path in out.parent.iterdir()] == ["six.jsonl"]


def test_the_data_command_writes_the_control(tmp_path):
    out = tmp_path / "control.jsonl"
    main(["data", "--out", str(out), "--count", "30", "--seed", "9", "--all-legal"])
    control = make_automaton(all_legal=True)
    rows = read_records(out)
    assert all(walk(control, row["prompt"])[-1] == row["answer"] for row in rows)
    assert any(walk(make_automaton(), row["prompt"]) is None for row in rows)


def test_a_wrong_count_ends_the_command_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "--out", str(tmp_path / "x.jsonl"), "--count", "0", "--seed", "1"])
    assert stop.value.code == 2 and "count" in capsys.readouterr().err


def test_a_folder_that_is_no_build_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"build\.out"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_shipped_prompts_are_legal_and_validation_shares_none_with_training():
    train, val = read_records(ASSETS / "train.jsonl"), read_records(ASSETS / "val.jsonl")
    assert (len(train), len(val)) == (4096, 256)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
    assert len({row["id"] for row in train + val}) == 4352
    assert all(walk(make_automaton(), row["prompt"])[-1] == row["answer"] for row in train + val)


def test_the_assets_are_small():
    assert folder_bytes(ASSETS) < 3_000_000


@torch.no_grad()
def graded(folder, rows):
    """Greedy accuracy by `generate`, marked here: the text must end in the right box."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        for row in rows
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer.endswith("\\boxed{" + row["answer"] + "}") for answer, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    ("name", "parameters", "low", "high"),
    [("teacher", 347_648, 0.95, 1.0), ("student", 91_904, 0.36, 0.52), ("reader", 91_904, 0.36, 0.62)],
)
def test_the_shipped_checkpoints_start_where_the_docs_say(name, parameters, low, high, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
    assert model.num_parameters() == parameters and model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert low <= graded(ASSETS / name, read_records(ASSETS / "val.jsonl")[:NUM_GRADED]) <= high


@pytest.mark.slow
def test_a_rebuild_reaches_the_shipped_accuracies(tmp_path):
    build(tmp_path / "assets")
    rows = read_records(tmp_path / "assets" / "val.jsonl")
    assert rows == read_records(ASSETS / "val.jsonl")
    assert graded(tmp_path / "assets" / "teacher", rows) >= 0.95
    # One standard error of a fraction near 0.43 on 256 prompts is 0.03.
    assert 0.36 <= graded(tmp_path / "assets" / "student", rows) <= 0.52
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]

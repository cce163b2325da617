"""Config blocks as compressed-tensors itself reads them: 0.20, and 0.17, which vLLM pins (`make test-serving`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.artifact.compressed_tensors.test_block import SCHEMES

from loadstone.artifact.compressed_tensors import Group, read_block, write_block

pytestmark = pytest.mark.serving

OLD = Path(sys.prefix) / "compressed-tensors-0.17"
PARSE = """
import json, sys, compressed_tensors
from compressed_tensors.quantization import QuantizationConfig
blocks = json.load(sys.stdin)
dumped = [json.loads(QuantizationConfig.model_validate(block).model_dump_json()) for block in blocks]
print(json.dumps({"version": compressed_tensors.__version__, "blocks": dumped}))
"""


@pytest.mark.parametrize("version", ["0.20", "0.17"])
def test_written_blocks_are_read_with_the_same_meaning(version):
    written = [
        write_block([Group("group_0", ("Linear",), scheme)], ["lm_head"]) for scheme in SCHEMES.values()
    ]
    groups = [
        Group(f"group_{n}", (f"re:.*layers.{n}.*",), scheme) for n, scheme in enumerate(SCHEMES.values())
    ]
    written.append(write_block(groups, ["lm_head", "model.layers.0.mlp.gate"]))
    environment = os.environ | ({"PYTHONPATH": str(OLD)} if version == "0.17" else {})
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(written),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"].startswith(version)
    for ours, theirs in zip(written, answer["blocks"], strict=True):
        # What they understood, read again by us, is what was meant.
        assert read_block(theirs).groups == read_block(ours).groups
        assert theirs["quantization_status"] == "compressed" and theirs["format"] == ours["format"]

"""The commands of docs/rules.md, one after the other in one shell, on a MiniStack that has IAM and runs rules."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys

import pytest
from support.aws import Account
from support.embedded import boto3_client_of
from support.machine import PATIENCE_S
from support.shell import Elf

from .test_readme import PAGES, in_language

# It parses the tags that a rule does not have with parse_qsl(), strictly, which took no empty text before 3.11.
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="MiniStack makes no rule with this Python")

# In place of the pause, what it is for: until `subscribe` listens.
ELF_AS_TYPED = """
python() {
    case $2 in
        send) $ELF "${@:2}" $BROKER;;
        subscribe) $ELF "${@:2}" $BROKER 2> >(tee -a subscribe.log >&2);;
        *) $ELF "${@:2}";;
    esac
}
sleep() { until grep -q "ELF listening" subscribe.log; do command sleep 0.1; done; }
touch subscribe.log
"""


@pytest.mark.skipif(not shutil.which("aws"), reason="the AWS CLI is not installed")
def test_each_message_comes_through_a_rule_that_is_made_and_taken_away(elf: Elf, account: Account) -> None:
    script = "".join(block.text for block in in_language("sh") if block.page == "docs/rules.md")
    assert not re.search(r"\$\w+:\w", script)  # of which zsh, macOS's shell, would take the letter for a modifier
    before, _, after = script.partition("aws iot delete-topic-rule")
    shell = ("bash", "-euo", "pipefail")
    said = elf.in_shell(f"{ELF_AS_TYPED}{before}\naws iot list-topic-rules; declare -p role", shell=shell)
    assert "ELF received 60 messages on 1 thing, 0 missing" in said.err
    assert re.search(r"latency \(from ts.*p50", said.err)
    assert '"topicPattern": "elf/+"' in said.out
    role = account.client("iam").get_role_policy(RoleName="elf-rule", PolicyName="publish")
    (statement,) = role["PolicyDocument"]["Statement"]
    assert statement["Action"] == "iot:Publish"
    here = 'eval "$(python elf.py env)"; aws iot delete-topic-rule'
    elf.in_shell(f"{ELF_AS_TYPED}{here}{after}", shell=shell)
    assert account.is_empty()
    assert account.iot.list_topic_rules()["rules"] == []
    assert account.client("iam").list_roles()["Roles"] == []
    assert not {"trust.json", "publish.json", "rule.json"} & {path.name for path in elf.cwd.iterdir()}


def test_the_embedded_aws_iot_runs_such_a_rule_without_iam(local: Elf) -> None:
    (rule,) = (block.text for block in in_language("sh") if "create-topic-rule" in block.text)
    (payload,) = re.findall("<<END\n(.*?)END\n", rule, re.DOTALL)
    (role,) = re.findall("`role=(.*?)`", PAGES["docs/rules.md"])
    (basic_ingest,) = re.findall("`send (--sequence .*?)`", PAGES["docs/rules.md"])
    local("--local", "create")
    payload = payload.replace("$role", role)
    boto3_client_of(local).create_topic_rule(ruleName="elf_rule", topicRulePayload=json.loads(payload))
    window = local.start("subscribe", "--topic", "behind/rule", "--count", 4, "--duration", PATIENCE_S)
    window.await_line("ELF listening on")
    local("send", "--sequence", "--count", 2, "--interval", "0.1")
    local("send", *shlex.split(basic_ingest), "--count", 2, "--interval", "0.1")
    assert "ELF received 4 messages on 1 thing, 0 missing" in window.end().err

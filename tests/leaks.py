"""Leaks as people leave them: files by their path in an image. Each holds one secret.

They are made at run time from a seed, so that no scanner finds one in this repository.
"""

from __future__ import annotations

import base64
import json
import random
import string

LETTERS, HEX = string.ascii_letters + string.digits, "0123456789abcdef"
UPPER = string.ascii_uppercase + string.digits


def leaks() -> dict[str, str]:
    """Return the content of each file."""
    dice = random.Random(7)  # noqa: S311 -- no key of anything

    def some(count: int, of: str = LETTERS) -> str:
        return "".join(dice.choice(of) for _ in range(count))

    def wrapped(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    pem = f"-----BEGIN RSA {'PRIVATE'} KEY-----\n{some(64)}\n{some(64)}\n-----END RSA"
    openai, github = f"sk-proj-{some(48)}", f"ghp_{some(36)}"
    service = {"type": "service_account", "private_key": pem.replace(" RSA", "")}
    docker = {"auths": {"r.io": {"auth": wrapped(f"me:{some(20)}")}}}
    azure = f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={some(86)}=="
    kube = f"users:\n- user:\n    client-key-data: {wrapped(pem)}\n"
    telegram = f"{some(10, '123456789')}:AA{some(33)}"
    slack = f"T{some(9, UPPER)}/B{some(9, UPPER)}/{some(24)}"
    return {
        "opt/openagents/.opencode/plugin/a.ts": f'new OpenAI({{ apiKey: "{openai}" }})',
        "opt/openagents/.opencode/tool/b.ts": f'const key = "sk-ant-api03-{some(93)}AA"',
        "opt/openagents/.opencode/settings.md": f"OPENAI_KEY={some(30)}",
        "opt/openagents/.env": "A=1",
        "opt/openagents/.git/config": f"[remote]\n\turl = https://oauth2:{some(20)}@git.internal/a",
        "app/scripts/.env.local": "A=1",
        "app/scripts/upload": f'password="{some(14)}"',
        "root/.config/opencode/opencode.json": f'{{"apiKey": "{some(32, HEX)}"}}',
        "root/.netrc": f"machine github.com login me password {some(20)}",
        "root/.docker/config.json": json.dumps(docker),
        "root/.npmrc": f"//registry.npmjs.org/:_authToken={some(36)}",
        "root/.ssh/id_ed25519": "x",
        "root/.kube/config": kube,
        "srv/kubeconfig.yaml": kube,
        "etc/pip.conf": f"[global]\nindex-url = https://me:{some(16)}@pypi.internal/simple",
        "srv/openrouter": f"sk-or-v1-{some(64, HEX)}",
        "srv/aws": f"AKIA{some(16, string.ascii_uppercase)}",
        "srv/aws.ini": f"aws_secret_access_key = {some(40)}",
        "srv/github": f"git clone https://x-access-token:{github}@github.com/a/b",
        "srv/gitlab": f"glpat-{some(20)}",
        "srv/npm": f"npm_{some(36)}",
        "srv/google": f"AIza{some(35)}",
        "srv/gcp.json": json.dumps(service),
        "srv/slack": f"xoxb-{some(12, string.digits)}-{some(13, string.digits)}-{some(24)}",
        "srv/slack.hook": f"https://hooks.slack.com/services/{slack}",
        "srv/stripe": f"sk_live_{some(24)}",
        "srv/sendgrid": f"SG.{some(22)}.{some(43)}",
        "srv/twilio": f"SK{some(32, HEX)}",
        "srv/huggingface": f"hf_{some(34, string.ascii_letters)}",
        "srv/pypi": f"pypi-AgEIcHlwaS5vcmc{some(80)}",
        "srv/dockerhub": f"dckr_pat_{some(27)}",
        "srv/digitalocean": f"dop_v1_{some(64, HEX)}",
        "srv/shopify": f"shpat_{some(32, HEX)}",
        "srv/linear": f"lin_api_{some(40)}",
        "srv/notion": f"ntn_{some(46)}",
        "srv/telegram": telegram,
        "srv/groq": f"gsk_{some(52)}",
        "srv/xai": f"xai-{some(80)}",
        "srv/age": f"AGE-SECRET-KEY-1{some(58, UPPER)}",
        "srv/vault": f"hvs.{some(95)}",
        "srv/datadog": f"DD_API_KEY={some(32, HEX)}",
        "srv/b2": f"K005{some(27)}",
        "srv/jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJ{some(40)}.{some(43)}",
        "srv/azure": azure,
        "srv/database.yml": f"DATABASE_URL: postgres://app:{some(19)}7@db.internal:5432/app",
        "srv/bearer.sh": f'curl -H "Authorization: Bearer {some(39)}7" https://api.internal',
        "srv/putty.ppk": "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\n",
        "srv/wrapped": wrapped(f"OPENAI_API_KEY={openai}"),
        "srv/secret.yaml": f"kind: Secret\ndata:\n  token: {wrapped(github)}\n",
        "srv/key.b64": base64.encodebytes(pem.encode()).decode(),
    }

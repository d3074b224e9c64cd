"""What `--help` of each command prints at its end: examples, environment variables and exit statuses."""

from __future__ import annotations

from collections.abc import Mapping

_SETTINGS = {
    "SD_GATEWAY_SECTION__KEY": "a setting, for example SD_GATEWAY_SERVER__PORT",
    "SPEEDPIX_ENDPOINT": "base URL of the vendor API (upstream.endpoint)",
    "SPEEDPIX_APP_KEY": "access key (credentials.access_key)",
    "SPEEDPIX_APP_SECRET": "secret key (credentials.secret_key)",
}
_NETWORK = {
    "HTTPS_PROXY, ALL_PROXY, NO_PROXY": "proxy for the way to the vendor",
    "SSL_CERT_FILE, SSL_CERT_DIR": "certificate authorities",
}
_STOPPED = {130: "stopped by Ctrl-C"}


def _help(examples: Mapping[str, str], variables: Mapping[str, str], statuses: Mapping[int, str]) -> str:
    parts = ["examples:", *(f"  {command}\n      {meaning}" for command, meaning in examples.items())]
    if variables:
        width = max(map(len, variables))
        parts += ["", "environment variables:"]
        parts += [f"  {name:{width}}  {meaning}" for name, meaning in variables.items()]
    parts += ["", "exit status:"]
    parts += [f"  {status:<3}  {meaning}" for status, meaning in statuses.items()]
    return "\n".join(parts)


HELP = {
    "": _help(
        {
            "sd-gateway demo": "try the gateway with a simulated upstream",
            "sd-gateway check": "test the key pair, the way to the vendor, and the store",
            "sd-gateway watch TASK": "follow a task",
            "sd-gateway watch --help": "options, examples and variables of a command",
        },
        {},
        {0: "success", 1: "failure", 2: "wrong usage or settings", **_STOPPED},
    ),
    "serve": _help(
        {
            "sd-gateway serve": "listen on 127.0.0.1:8080",
            "SD_GATEWAY_SERVER__HOST=0.0.0.0 sd-gateway serve --config gateway.toml": (
                "read settings from a file, and override one"
            ),
        },
        _SETTINGS | _NETWORK | {"OTEL_…": "traces, with the extra otel"},
        {0: "stopped by SIGTERM", 1: "cannot listen", 2: "wrong usage or settings", **_STOPPED},
    ),
    "watch": _help(
        {
            "sd-gateway watch 01j5t2qx82323pswaqykz9eq4": "follow a task of the gateway on this machine",
            "sd-gateway watch A B --gateway gateway.example.com:8080": "follow two tasks elsewhere",
            "sd-gateway watch A --api comfy --save images --timeout 600": (
                "wait at most ten minutes for a ComfyUI task, and save its images"
            ),
            "sd-gateway watch A --json | jq .progress": "one line of JSON per event, for scripts",
        },
        {
            "SD_GATEWAY_URL": "the gateway, if --gateway is not given",
            "HTTPS_PROXY, HTTP_PROXY, NO_PROXY": "proxy for the way to the gateway",
            "SSL_CERT_FILE, SSL_CERT_DIR": "certificate authorities, if --cacert is not given",
        },
        {
            0: "every task has succeeded, and its images are saved with --save",
            1: "a task has failed or is not known, an image is missing, or the time is over",
            2: "wrong usage, or a server at this URL that is not a gateway",
            130: "stopped by Ctrl-C; the command that resumes is printed",
        },
    ),
    "check": _help(
        {
            "sd-gateway check": "use the settings that `sd-gateway serve` would use",
            "SPEEDPIX_APP_KEY=… SPEEDPIX_APP_SECRET=… sd-gateway check": "try a key pair",
        },
        _SETTINGS | _NETWORK,
        {
            0: "everything works",
            1: "the output names what does not",
            2: "wrong usage or settings",
            **_STOPPED,
        },
    ),
    "config": _help(
        {
            "sd-gateway config": "print every setting",
            "sd-gateway config --config gateway.toml | grep -v '# default$'": "only what is set",
        },
        _SETTINGS,
        {0: "success", 2: "wrong usage or settings", **_STOPPED},
    ),
    "demo": _help(
        {
            "sd-gateway demo": "open the printed URL in a browser; Ctrl-C stops the demo",
            "SD_GATEWAY_SERVER__PORT=8090 sd-gateway demo --simulator-port 0": "use other ports",
            "SD_GATEWAY_LOG__LEVEL=info sd-gateway demo": "log each request, too",
        },
        {"SD_GATEWAY_SECTION__KEY": _SETTINGS["SD_GATEWAY_SECTION__KEY"]},
        {0: "stopped by SIGTERM", 1: "cannot listen", 2: "wrong usage or settings", **_STOPPED},
    ),
    "simulate": _help(
        {
            "sd-gateway simulate --port 9000 --latency 0.2": "respond after 0.2 s",
            "sd-gateway simulate --limit 5": "throttle above five calls per second",
            """sd-gateway simulate --fault '{"name": "refuse", "code": "A400IK"}'""": (
                "refuse every access key"
            ),
        },
        {},
        {0: "stopped by SIGTERM", 1: "cannot listen", 2: "wrong usage", **_STOPPED},
    ),
    "completion": _help(
        {
            'eval "$(sd-gateway completion bash)"': "in ~/.bashrc",
            "sd-gateway completion zsh > ~/.zfunc/_sd-gateway": "in a directory of zsh's fpath",
            "sd-gateway completion fish > ~/.config/fish/completions/sd-gateway.fish": "for fish",
        },
        {},
        {0: "success", 2: "wrong usage"},
    ),
}

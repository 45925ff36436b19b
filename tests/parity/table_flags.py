"""Flags as the environment spells them, wrong words for each flag, and commands of no container."""

from __future__ import annotations

from tests.parity.rows import BOTH, ROOT, SETUID, Case, environment, payload

WORDS = "the words are our own, the status is the same"
ESCAPED = "a byte that is no text is shown by its number"
ONE_LINE = "what is wrong is said in the same line"
EMPTY = "an empty word is a mistake, and said to be one"
MADE = "a target that the image lacks is made"
SLASH = "only a directory has a slash behind its name"
NOTHING = "an empty word asks for nothing"
BOX = "without /bin/sh no start is possible, which is 255 as ever"
SEES = "exec {sif} sh -c 'uname -n; umask; pwd; echo $HOME $X; ls -A /mnt /scr 2>&1 | wc -l'"
# Environment key, and a value that can be seen to work or to be refused.
SETTINGS = (
    ("CLEANENV", "1"), ("CLEANENV", "0"), ("CLEANENV", "true"), ("CLEANENV", "FALSE"),
    ("CLEANENV", "maybe"), ("CLEANENV", ""), ("CONTAIN", "1"), ("CONTAINALL", "1"),
    ("NO_HOME", "1"), ("NO_EVAL", "1"), ("NO_UMASK", "1"), ("NOSHIMINIT", "1"), ("PID", "1"),
    ("UNSHARE_PID", "1"), ("NO_PID", "1"), ("IPC", "1"), ("UNSHARE_IPC", "1"), ("UTS", "1"),
    ("UNSHARE_UTS", "1"), ("HOSTNAME", "box"), ("HOME", "{other}:/h"), ("HOME", "a:b:c"),
    ("CWD", "/etc"), ("TARGET_CWD", "/etc"), ("PWD", "/etc"), ("TARGET_PWD", "/etc"),
    ("NO_MOUNT", "tmp,home"), ("SCRATCH", "/scr"), ("SCRATCHDIR", "/scr"), ("NO_PRIVS", "1"),
    ("APP", "foo"), ("APPNAME", "foo"), ("ENV_FILE", "{env}"), ("BIND", "{data}:/mnt"),
    ("BINDPATH", "{data}:/mnt"), ("MOUNT", "type=bind,src={data},dst=/mnt"),
)  # fmt: skip

SPELLINGS = [
    *(
        payload(
            "",
            env={f"APPTAINER_{key}": value},
            differs={"said": ONE_LINE} if value == "maybe" else {},
        )
        for key, value in SETTINGS
    ),
    *(
        Case(
            SEES,
            env={f"SINGULARITY_{key}": value},
            differs={"said": ONE_LINE} if value == "maybe" else {},
        )
        for key, value in SETTINGS
        if key not in ("NO_PRIVS", "APP", "APPNAME")
    ),
    Case(SEES, env={"APPTAINER_HOSTNAME": "one", "SINGULARITY_HOSTNAME": "two"}),
    Case(SEES, env={"APPTAINER_HOSTNAME": "one", "SINGULARITY_HOSTNAME": "one"}),
    Case(
        SEES,
        env={"APPTAINER_CWD": "/etc", "APPTAINER_PWD": "/usr"},
        differs={"stdout": "the name wins over its older synonym"},
    ),
    Case("exec --cwd /tmp {sif} sh -c pwd", env={"APPTAINER_CWD": "/etc"}),
    Case("exec --cwd /tmp --pwd /etc {sif} sh -c pwd"),
    Case("exec --hostname cli {sif} uname -n", env={"APPTAINER_HOSTNAME": "env"}),
    Case("exec -S /scr {sif} ls -d /scr /other", env={"APPTAINER_SCRATCH": "/other"}),
    Case("exec --no-mount tmp {sif} sh -c pwd", env={"APPTAINER_NO_MOUNT": "home"}),
    Case("exec --cleanenv=false {sif} sh -c 'echo $X'", env={"APPTAINER_CLEANENV": "1", "X": "x"}),
    Case("exec --contain=0 {sif} sh -c 'ls /dev | wc -l'", env={"APPTAINER_CONTAIN": "1"}),
    Case("exec -eip {sif} sh -c 'echo $X'", env={"X": "x"}),
    Case("exec -eiB {data}:/mnt {sif} ls /mnt"),
    Case("exec --bind={data}:/mnt {sif} ls /mnt"),
    Case("exec -B={data}:/mnt {sif} ls /mnt"),
    Case("exec -B{data}:/mnt {sif} ls /mnt"),
    Case("exec --bin {data}:/mnt {sif} ls /mnt", form="usage"),
    Case("exec -- {sif} echo --"),
    Case("exec {sif} echo -B --bind -- -x"),
    Case("run {sif} -B --help"),
    Case("shell -s /bin/sh {sif} -c 'echo by letter'"),
    Case("shell {sif}", stdin="echo $0\n", env={"APPTAINER_SHELL": "/bin/sh"}),
    environment("run {sif}", env={"APPTAINER_BIND": "/nonexistent"}),
    environment("exec {sif} env", env={"APPTAINER_NV_OFF": "1", "APPTAINER_NO_ROCM": "1"}),
    environment("exec {sif} env", env={"SINGULARITY_CONTAINER": "x", "APPTAINER_NAME": "y"}),
    environment("exec {sif} env", env={"SINGULARITY_BIND": "{data}:/mnt"}),
]

BOOLS = (
    "allow-setuid cleanenv compat contain containall ipc keep-privs no-eval no-home no-init no-nv "
    "no-pid no-privs no-rocm no-umask pid underlay userns uts writable writable-tmpfs"
).split()
TEXTS = (
    "add-caps app bind cwd drop-caps env env-file home hostname mount no-mount pwd scratch workdir"
).split()
LETTERS = "BHSW"


def usage(line: str, **more: object) -> Case:
    return Case(line, form="usage", **more)  # type: ignore[arg-type]


BAD = [
    *(usage(f"exec --{name}=maybe {{sif}} true") for name in BOOLS),
    *(usage(f"exec --{name}") for name in TEXTS),
    *(usage(f"exec -{letter}") for letter in LETTERS),
    *(usage(f"{command} --nonsense {{sif}}") for command in ("run", "shell", "test")),
    *(usage(f"{command}") for command in ("run", "shell", "test")),
    usage("exec -Z {sif} true"),
    usage("exec -cZ {sif} true"),
    usage("exec --shell /bin/sh {sif} true"),
    usage("exec --env =x {sif} true"),
    usage("exec --env A {sif} true"),
    usage("exec --env A=1,B {sif} true"),
    usage("exec --env '\"A=1' {sif} true"),
    usage("exec --env-file '' {sif} true"),
    usage("exec --env-file {data} {sif} true", differs={"said": WORDS}),
    usage("exec --env-file {env},/nonexistent {sif} true"),
    usage("exec --app '' {sif} true"),
    usage("exec --app ../foo {sif} true"),
    usage("exec --app '\udcff' {sif} true"),
    usage("exec --cwd '\udcff' {sif} true", differs={"said": ESCAPED}),
    usage("exec --pem-path /nonexistent {sif} true"),
    usage("exec --pem-path /etc/hostname {sandbox} true"),
    usage("exec {sif} true", env={"APPTAINER_ENCRYPTION_PEM_PATH": "/nonexistent"}),
    usage("exec --cwd '' {sif} true"),
    usage("exec --home '' {sif} true", differs={"status": NOTHING, "said": NOTHING}),
    usage("exec --home relative {sif} true"),
    usage("exec --home {data}: {sif} true"),
    usage("exec --home :/h {sif} true", differs={"status": EMPTY, "said": EMPTY}),
    usage("exec --home {data}/file {sif} true", differs={"said": WORDS}),
    usage("exec --home /dev/null {sif} true", differs={"said": WORDS}),
    usage("exec --hostname '' {sif} uname -n"),
    usage("exec --hostname " + "a" * 70 + " {sif} true", differs={"said": WORDS}),
    usage("exec --no-mount '' {sif} true"),
    usage("exec --no-mount relative/path {sif} true"),
    usage("exec --scratch '' {sif} true"),
    usage("exec --workdir '' -c {sif} true"),
    usage("exec --workdir {data}/file -c {sif} true"),
    usage("exec --add-caps , {sif} true", differs={"said": NOTHING}),
    usage("exec --drop-caps foo {sif} true", flows=BOTH),
    usage("exec --mount '' {sif} true", differs={"status": EMPTY, "said": EMPTY}),
    usage("exec --mount type=bind {sif} true"),
    usage("exec --mount 'type=bind,src={data},dst=/mnt,\"' {sif} true", differs={"said": WORDS}),
    usage("exec --mount type=bind,src=/nonexistent,dst=/mnt {sif} true"),
    usage("exec --mount type=bind,src={data},dst=mnt {sif} true"),
    usage("exec -w --writable-tmpfs {linked} true"),
    usage("exec -w /nonexistent true"),
    usage("exec {data} true", differs={"said": MADE}),
    usage("exec {data}/file true"),
    usage("exec '' true", differs={"said": EMPTY}),
    usage("exec {sif}/ true", differs={"status": SLASH, "said": SLASH}),
    usage("exec {sif} ''"),
    usage("run /dev/null", differs={"said": WORDS}),
    usage("run {place}", differs={"status": BOX, "said": BOX}),
    usage("shell /nonexistent"),
    usage("test /nonexistent"),
]

READ = (SETUID,)
OUTSIDE = [
    *(Case(f"inspect {option} {{{image}}}", flows=READ)
      for image in ("sif", "sandbox")
      for option in ("", "-l", "-d", "-r", "-s", "-t", "-e", "-H", "--list-apps", "--json",
                     "--all", "--app foo -r", "--app foo -l", "--app foo -H", "--app missing")),
    *(Case(f"inspect {name}", flows=READ) for name in ("{zstd}", "{plain}", "{squash}")),
    *(Case(f"sif {verb} {{sif}}", flows=READ) for verb in
      ("list", "header", "info 1", "info 2", "info 3", "dump 1", "dump 2")),
    *(usage(f"sif {verb} {{sif}}", flows=READ) for verb in ("info 99", "dump 99", "dump x")),
    Case("sif list {zstd}", flows=READ),
    *(usage(f"sif list {name}", flows=READ) for name in
      ("/etc/passwd", "/nonexistent", "{sandbox}", "{squash}")),
    usage("sif", flows=READ), usage("sif list", flows=READ), usage("sif info {sif}", flows=READ),
    usage("sif info x {sif}", flows=READ), usage("sif nonsense {sif}", flows=READ),
    usage("inspect", flows=READ), usage("inspect /nonexistent", flows=READ),
    usage("inspect /etc/passwd", flows=READ), usage("inspect --nonsense {sif}", flows=READ),
    usage("nonsense", flows=READ), usage("--nonsense", flows=READ), usage("", flows=READ),
    usage("help", flows=READ), usage("help nonsense", flows=READ), usage("help exec", flows=READ),
    usage("exec --help", flows=READ), usage("config", flows=READ),
    usage("config global --get 'mount proc'", flows=(SETUID, ROOT)),
    usage("config global --set 'mount proc' no", flows=READ),
    usage("config global --get nonsense", flows=(ROOT,)),
    usage("config global", flows=(ROOT,)),
    usage("completion bash", flows=READ), usage("completion nonsense", flows=READ),
]  # fmt: skip

"""The command lines that both programs run, and every difference that is meant, with its reason.

What a line is: rows.py. The tables of flags and of commands without a container: table_flags.py.
To add lines, add a group to GROUPS; groups that QUICK does not name run with ./check --all.
"""

from __future__ import annotations

from tests.parity.rows import (
    BOTH,
    PAYLOAD,
    ROOT,
    SETUID,
    USERNS,
    Case,
    environment,
    mounted,
    payload,
    sequence,
)
from tests.parity.table_flags import BAD, OUTSIDE, SPELLINGS

NO_PID = "--no-pid does what its help says"
SCRATCH = "a scratch directory without a slash lies below the root"
BETTER = "the lines before the mistake count, and a warning names what is left out"
LAYER = "the kernel's overlay, where the real one starts fuse-overlayfs"
LEVEL = "bash counts SHLVL wherever it is the image's /bin/sh"
GROUP = "root's group, which the image has, is not listed twice"
INH = "a change to another user would take them along"
HELP = "the help texts are our own"
READ_ONLY = "squashfs is never writable, which the real one says of bare images alone"
SHORTER = "what is missing is said without the names of the hooks that found out"
SOONER = "the mistake is found before the image is opened"
CGROUPFS = "root's limits need no systemd"
PASSWD = "both files of the image are found and completed"
WORDING = "the host's own shell says what is wrong with the file"
MISSING = "who joins is told of the own directory, too, that it is not there"
SETTING = "a setting that is none, or that is empty, starts nothing"

IMAGES = [
    *(
        Case(f"exec {{{name}}} cat /etc/test-release")
        for name in ("sif", "zstd", "squash", "sandbox", "plain")
    ),
    *(Case(f"run {{{name}}} a 'b c'") for name in ("sif", "zstd", "squash", "sandbox")),
    *(Case(f"test {{{name}}}") for name in ("zstd", "squash", "sandbox")),
    Case("run --app foo {sif} x"),
    Case("exec --app foo {sif} sh -c 'echo $APPV $SCIF_APPNAME $SCIF_APPROOT $PATH'"),
    Case("test --app foo {sif}"),
    environment("exec --app foo {zstd} env"),
    Case("run --app foo {zstd} x"),
    Case("run --app missing {zstd}"),
    Case("run --app missing {sif}"),
    Case("test --app missing {sif}"),
    Case("shell {sif} -c 'echo $0 $SHELL $1' name arg"),
    Case("shell {bash} -c 'echo $0 $SHELL $1' name arg"),
    Case("shell --shell /bin/cat {sif}", stdin="through cat\n"),
    Case(
        "shell --shell /nonexistent {sif}",
        stdin="echo fallen back\n",
        differs={"said": "that another shell starts than the one asked for is told"},
    ),
    Case("shell {sif}", stdin="echo piped; exit 5\n"),
    Case("run {plain} -c 'echo no runscript; exit 4'"),
    Case(
        "test {plain}",
        differs={
            "status": "no test is no failure",
            "said": "the real one runs a script that is not there",
        },
    ),
    Case("exec {sif} cat", stdin="through stdin\n"),
    Case("exec {sif} sh -c 'echo out; echo err >&2'"),
]

STATUS = [
    *(Case(f"exec {{sif}} sh -c 'exit {status}'") for status in (0, 1, 2, 126, 127, 134, 255)),
    *(Case(f"exec {{sif}} sh -c 'kill -{signal} $$'") for signal in (1, 2, 9, 15)),
    *(Case(f"exec -p {{sif}} sh -c 'kill -{signal} $$'") for signal in (9, 15)),
    Case("exec -p {sif} sh -c 'exit 7'"),
    Case("exec -p --no-init {sif} sh -c 'echo $$; exit 7'"),
    Case("exec {sif} nonexistent"),
    Case("exec {sif} /nonexistent"),
    Case("exec {sif} ./nonexistent"),
    Case("exec {sif} /bin/nonexistent/x"),
    Case("exec {sif} /etc/passwd"),
    Case("exec {sif} /etc"),
    Case("exec {sif} etc", cwd="/"),
    Case("exec {linked} noexec"),
    Case("exec {linked} noshebang"),
    Case("exec {linked} nointerpreter"),
    Case("exec {sif}"),
    Case("exec"),
    Case("exec /nonexistent.sif true"),
    Case("exec /etc/passwd true"),
    Case("exec foo://bar true"),
    Case("exec --badopt {sif} true", differs={"stdout": HELP}),
    Case("exec {sif} sh -c 'echo $0'"),
    Case("-s exec {sif} nonexistent"),
    Case("-q exec {sif} nonexistent"),
    Case("-q exec --no-mount nonsense {sif} true"),
    Case("-s exec --no-mount nonsense {sif} true"),
    Case("-v exec {sif} true"),
]

ENVIRONMENT = [
    *(
        environment(f"exec {{{name}}} env")
        for name in ("sif", "zstd", "squash", "sandbox", "plain", "busy", "dash")
    ),
    environment("exec {bash} env"),
    environment("exec {bash} env", env={"SHLVL": "3"}),
    *(
        environment(
            line,
            env={
                "FROM_HOST": "host",
                "FROM_IMAGE": "host",
                "EMPTIED": "host",
                "UNEXPORTED": "host",
                "MULTI_H": "a\nb",
                "PREFIXED": "h",
                "QUOTE": 'it\'s "quoted" `x` $(y) \\n',
                "lower": "l",
                "_U": "u",
                "BAD-NAME": "1",
                "9X": "2",
                "dot.name": "3",
                "BASH_FUNC_f%%": "() { :; }",
                "LD_LIBRARY_PATH": "/host",
                "UID": "7",
                "GID": "8",
                "SHLVL": "4",
                "PS1": "host> ",
                "LC_ALL": "xx_YY.UTF-8",
                "EMPTY": "",
                "TERM": "dumb",
                "http_proxy": "http://p",
                "NO_PROXY": "n",
                "IFS": "x",
                "APPTAINER_FOO": "no",
                "SINGULARITY_FOO": "no",
                "PROMPT_COMMAND": "echo prompt",
            },
        )
        for line in (
            *(f"exec {{{name}}} env" for name in ("sif", "busy", "dash", "bash", "plain")),
            "exec -e {dash} env",
            "exec -C {bash} env",
        )
    ),
    *(
        environment(
            f"exec {options} {{{name}}} env",
            differs={"stdout": LEVEL} if options == "-e" and name == "bash" else {},
            env={
                "APPTAINERENV_A": "$(echo evaluated)",
                "APPTAINERENV_B": "$HOME/x",
                "APPTAINERENV_C": "`echo tick`",
                "APPTAINERENV_D": 'say "hi" \\$A',
                "APPTAINERENV_E": "two\nlines",
                "APPTAINERENV_EMPTY": "",
                "SINGULARITYENV_F": "old",
                "APPTAINERENV_FROM_IMAGE": "injected",
                "APPTAINERENV_G": "it's",
                "APPTAINERENV_UID": "9",
                "SINGULARITYENV_A": "other",
                "A": "host",
                "APPTAINERENV_HOME": "/h",
                "APPTAINERENV_LD_LIBRARY_PATH": "/ll",
                "SHLVL": "2",
            },
        )
        for options in ("", "--no-eval", "-e")
        for name in ("sif", "dash", "bash", "busy")
    ),
    *(
        Case("exec {dash} sh -c 'echo $PATH'", env=env)
        for env in (
            {"APPTAINERENV_PATH": "/p:$PATH:/bin"},
            {"APPTAINERENV_PREPEND_PATH": "/pre"},
            {"APPTAINERENV_APPEND_PATH": "/post"},
            {"SINGULARITYENV_APPEND_PATH": "/old"},
            {"APPTAINERENV_PREPEND_PATH": "/pre", "APPTAINERENV_APPEND_PATH": "/post"},
            {"APPTAINERENV_PATH": "/bin", "APPTAINERENV_PREPEND_PATH": "/pre"},
            {"APPTAINERENV_PATH": ""},
        )
    ),
    environment("exec --env X=1,Y=two --env Z=$(id) {sif} env"),
    environment("exec --env 'X=a b' --env FROM_IMAGE=cli {dash} env"),
    environment("exec --env HOME=/x {sif} env"),
    environment("exec --env PATH=/bin --env LD_LIBRARY_PATH=/q {sif} env"),
    environment("exec --env X=cli {sif} env", env={"APPTAINERENV_X": "env", "X": "host"}),
    environment("exec --env-file {env} {sif} env"),
    environment("exec --env-file {env} --env EF1=cli {sif} env"),
    environment("exec --env-file {env},{env2} {sif} env"),
    environment("exec {sif} env", env={"APPTAINER_ENV_FILE": "{env}"}),
    environment("exec --env-file {env3} {sif} env", env={"HOST": "h"}),
    environment("exec --env-file {env3} --no-eval {dash} env", env={"HOST": "h"}),
    *(
        Case(f"exec --env-file {{place}}/{name} {{sif}} true", differs={"said": WORDING})
        for name in ("env-blank", "env-open")
    ),
    environment("exec --env ' X=1, Y=2' {sif} env"),
    environment("exec --env X= {sif} env", env={"X": "host", "APPTAINERENV_Z": "", "Z": "host"}),
    Case("exec --env-file /nonexistent {sif} true"),
    Case("exec --env foo {sif} true", differs={"stdout": HELP}),
    environment("exec -B {data} -B {other}:/mnt:ro {sif} env"),
    environment("run {dash} ; env"),
    Case("exec {broken} sh -c 'echo ran $PATH'", differs={"said": BETTER}),
    Case("exec {sif} sh -c 'echo $X'", env={"APPTAINERENV_X": "`"}, differs={"said": BETTER}),
]

FILES = [
    *(
        Case(
            f"exec {{{image}}} cat /etc/{name}",
            differs={"stdout@root": GROUP} if name == "group" else {},
        )
        for image in ("sif", "plain")
        for name in ("passwd", "group", "hosts", "resolv.conf")
    ),
    Case("exec {sif} sh -c 'ls -l /etc/passwd /etc/group | cut -c1-10'"),
    Case("exec {sif} id"),
    Case("exec -H {other}:/h {sif} cat /etc/passwd"),
    Case("exec {sif} readlink /proc/self/cwd"),
    Case("exec {sif} sh -c 'cd; pwd; echo $HOME'"),
    *(
        Case(
            "exec {sif} sh -c 'umask; touch $HOME/.u$$; stat -c %a $HOME/.u$$; rm $HOME/.u$$'",
            umask=umask,
        )
        for umask in (0o022, 0o077, 0o002)
    ),
    Case("exec --no-umask {sif} sh -c umask", umask=0o077),
    Case("exec {sif} sh -c 'ulimit -s; ulimit -n; ulimit -c; ulimit -u'"),
]

DIRECTORY = [
    *(
        Case("exec {sif} sh -c pwd", cwd=cwd)
        for cwd in (
            "/",
            "/etc",
            "/usr",
            "/tmp",
            "{home}",
            "{data}",
            "{work}/link",
            "/proc",
            "/mnt",
            "/usr/share/doc",
            "/srv",
        )
    ),
    Case("exec {sif} sh -c pwd", cwd="/opt"),
    *(
        Case(f"exec {option} {{sif}} sh -c 'pwd; echo $PWD'")
        for option in (
            "--pwd /etc",
            "--cwd /tmp",
            "-c",
            "-C",
            "--no-home",
            "-c --no-home",
            "--no-mount cwd",
            "--no-mount tmp",
            "-H {other}:/h",
            "-c -H {other}:/h",
            "--pwd /nonexistent",
            "--cwd relative",
        )
    ),
    Case("exec --no-mount tmp {sif} sh -c pwd", cwd="/tmp"),
    Case("exec {sif} sh -c pwd", env={"APPTAINER_PWD": "/etc"}),
]

BINDS = [
    *(
        Case(f"exec {options} {{sif}} sh -c '{command}'")
        for options, command in (
            ("-B {data}", "cat {data}/file; touch {data}/new && rm {data}/new && echo rw"),
            ("-B {data}:/mnt", "cat /mnt/file"),
            ("-B {data}:/mnt:ro", "cat /mnt/file; touch /mnt/new"),
            ("-B {data}:/mnt:rw", "touch /mnt/new && rm /mnt/new"),
            ("-B {data}:/new/deep/target", "cat /new/deep/target/file; ls -ld /new | cut -c1-10"),
            ("-B {data}/file:/mnt/f", "cat /mnt/f"),
            ("-B {data}/file:/etc/test-release", "cat /etc/test-release"),
            ("-B {data}/file:/etc/passwd", "cat /etc/passwd"),
            ("-B {data}:/mnt,{other}:/opt", "cat /mnt/file /opt/file"),
            ("-B {data}:/mnt -B {other}:/mnt/inner", "cat /mnt/file /mnt/inner/file"),
            ("-B {other}:/mnt/inner -B {data}:/mnt", "cat /mnt/file /mnt/inner/file"),
            ("-B {data}:/mnt -B {other}:/mnt", "cat /mnt/file"),
            ("-B ../data:/mnt", "cat /mnt/file"),
            ("-B link:/mnt", "cat /mnt/file"),
            ("-B ./link/file:/mnt/x", "cat /mnt/x"),
            ("-B {data}:relative", "true"),
            ("-B {data}:/tmp", "cat /tmp/file"),
            ("-B {data}:", "cat {data}/file"),
            ("-B /nonexistent", "true"),
            ("-B /nonexistent:/mnt", "true"),
            ("-B {data}:/a:b:c", "true"),
            ("-B {data}:/mnt:badopt", "true"),
            ("-B {data}:/mnt:ro,rw", "touch /mnt/new && rm /mnt/new"),
            ("-B :{data}", "cat {data}/file"),
            ("-B ''", "true"),
            ("-B {data}/:/mnt/", "cat /mnt/file"),
            ("-B {data}::ro", "touch {data}/new"),
            ("-B {data}:/mnt:", "cat /mnt/file"),
            ("-B ' {data}: /mnt: ro, {other}:/opt'", "cat /mnt/file /opt/file; touch /mnt/new"),
            ("-B {data}:{work}", "pwd; cat file"),
            ("-B {other}:{home}/par", "pwd; cat {home}/par/file"),
            ("-B /root:/mnt", "stat -c %a /mnt"),
            ("--mount type=bind,src={data},dst=/mnt,id", "true"),
            ("--mount type=bind,src={data},dst=/mnt,bind-propagation=rslave", "true"),
            ("-B {data}:/bin/../mnt", "cat /mnt/file"),
            ("-B '{place}/a\\:b\\,c:/mnt/x'", "cat /mnt/x"),
            ("-B {data}:/etc/test-release", "true"),
            ("-B {data}/file:/opt", "true"),
            ("-B {data}:/tmp/{user}-target", "true"),
            ("-B /etc/shadow", "cat /etc/shadow"),
            ("-B /root/x:/mnt", "true"),
            ("--mount type=bind,source={data},destination=/mnt", "cat /mnt/file"),
            ("--mount type=bind,src={data},dst=/mnt,ro", "touch /mnt/x"),
            ("--mount type=bind,src={data},target=/mnt,readonly", "touch /mnt/x"),
            ("--mount type=tmpfs,dst=/mnt", "true"),
            ("--mount type=bind,src={data}", "true"),
            ("--mount type=bind,src={data},dst=/mnt,bad=1", "true"),
            ("--mount src={data},dst=/mnt", "cat /mnt/file"),
            ("--mount 'type=bind,\"source={place}/a:b,c\",dst=/mnt/x'", "cat /mnt/x"),
        )
    ),
    Case(
        "exec -B {data}:/etc {sif} cat /etc/file",
        differs={
            "said": "system binds come before the user's, and find their targets",
        },
    ),
    Case("exec -B {data}:/ {sif} true", differs={"said": "we say what is not mounted"}),
    Case("exec {sif} cat /mnt/file", env={"APPTAINER_BIND": "{data}:/mnt"}),
    Case("exec {sif} cat /mnt/file", env={"SINGULARITY_BINDPATH": "{data}:/mnt"}),
    Case(
        "exec -B {other}:/opt {sif} cat /mnt/file /opt/file",
        env={"APPTAINER_BINDPATH": "{data}:/mnt"},
    ),
    Case("exec {sif} cat /mnt/file", env={"APPTAINER_MOUNT": "type=bind,src={data},dst=/mnt"}),
    Case("exec -B {data}:/alias {linked} cat /opt/real/file"),
    Case("exec -B {data}:/alias/new {linked} cat /opt/real/new/file"),
    Case("exec -B {data}:/var/run/new {linked} cat /run/new/file"),
    Case("exec -w -B {data}:/opt/missing {linked} true"),
    Case("exec -w -B {data}:/opt/real {linked} cat /opt/real/file"),
]

FLAGS = [
    Case("exec -w {linked} sh -c 'echo w >/opt/w && cat /opt/w && rm /opt/w'"),
    Case("exec -w {sif} true"),
    Case("exec -w {squash} true"),
    Case("exec -w {plain} true"),
    Case("exec {linked} sh -c 'echo w >/opt/w'"),
    Case("exec {sif} sh -c 'echo w >/opt/w'"),
    Case("exec --writable-tmpfs {sif} sh -c 'echo w >/opt/w && cat /opt/w'"),
    Case("exec --writable-tmpfs {linked} sh -c 'echo w >/opt/w && cat /opt/w'"),
    Case("exec --writable-tmpfs {sif} sh -c 'rm /etc/test-release && ls /etc/test-release'"),
    Case("exec -p {sif} sh -c '[ $$ -lt 100 ] && echo low'"),
    Case("exec -p {sif} cat /proc/1/comm"),
    Case(
        "exec --no-pid -p {sif} cat /proc/2/comm",
        differs={
            "status": NO_PID,
            "stdout": NO_PID,
        },
    ),
    Case("exec --hostname box {sif} sh -c 'uname -n; cat /etc/hostname; cat /etc/hosts'"),
    Case("exec --hostname bad_name! {sif} true"),
    Case("exec --uts {sif} uname -n"),
    Case("exec -c {sif} sh -c 'ls -A /tmp /var/tmp $HOME; ls /dev'"),
    Case("exec -C {sif} sh -c 'ls -A /tmp /var/tmp $HOME; ls -l /dev | cut -c1-10; ls /dev'"),
    Case("exec -C {sif} sh -c 'for n in stdin stdout fd ptmx core; do readlink /dev/$n; done'"),
    Case("exec --compat {sif} sh -c 'umask; pwd; echo x >/x && cat /x'"),
    Case("exec -c {sif} sh -c 'echo x >/dev/null; head -c 2 /dev/zero | wc -c'"),
    Case("exec -c {sif} stat -c %a /dev/shm"),
    Case("exec -S other {sif} touch /other/b", differs={"status": SCRATCH, "said": SCRATCH}),
    Case("exec -S /scr {sif} sh -c 'touch /scr/a && ls -ld /scr | cut -c1-10'"),
    Case("exec -c -W {away} {sif} sh -c 'cd; touch /tmp/t /var/tmp/v h && rm /tmp/t /var/tmp/v h'"),
    Case("exec -W {away} -S /scr {sif} sh -c 'touch /scr/s && rm /scr/s; stat -c %a /scr'"),
    Case("exec -c -W /nonexistent/x {sif} true"),
    Case("exec --no-home {sif} ls {home}"),
    Case("exec -H {other} {sif} sh -c 'echo $HOME; cat $HOME/file'"),
    Case("exec -H {other}:/h {sif} sh -c 'echo $HOME; cat /h/file'"),
    Case("exec -c -H {other}:/h {sif} sh -c 'echo $HOME; cat /h/file'"),
    Case("exec -H /nonexistent:/h {sif} true", differs={"said": "we say what is not mounted"}),
    Case("exec -H {other}:relative {sif} true"),
    Case("exec -H a:b:c {sif} true"),
    *(
        Case(
            f"exec --no-mount {key} {{sif}} ls -d /proc/self /sys/kernel {{home}}",
            differs={"said": "nothing of ours needs the container's /proc"},
        )
        for key in ("proc", "proc,sys")
    ),
    *(
        Case(f"exec --no-mount {key} {{sif}} ls -d /proc/self /sys/kernel /dev/full {{home}}")
        for key in (
            "sys",
            "dev",
            "home",
            "tmp",
            "hostfs",
            "bind-paths",
            "nonsense",
            "/etc/localtime",
            "devpts",
        )
    ),
    Case(
        "exec --add-caps CAP_NET_RAW {sif} sh -c 'grep Cap /proc/self/status'",
        differs={"stdout@root": INH},
    ),
    Case("exec --add-caps CAP_FOO {sif} true"),
    Case("exec --drop-caps CAP_NET_RAW {sif} sh -c 'grep Cap /proc/self/status'", flows=BOTH),
    Case(
        "exec {sif} sh -c 'grep -e Cap -e NoNewPrivs -e Groups /proc/self/status'",
        differs={"stdout@root": INH},
    ),
    Case("exec --keep-privs {sif} true"),
    Case("exec --no-privs {sif} sh -c 'grep Cap /proc/self/status'"),
    Case("exec --allow-setuid {sif} true"),
    *(
        Case(f"exec --security {word} {{sif}} true")
        for word in (
            "seccomp:/nonexistent",
            "apparmor:x",
            "'' -C",
        )
    ),
    *(
        Case(f"exec --security {word} {{sif}} true", flows=(SETUID,))
        for word in (
            "uid:0",
            "uid:1001",
            "gid:5:6",
            "uid:x",
            "gid:5,uid:1",
        )
    ),
    *(
        Case(
            f"exec --security {word} {{sif}} sh -c 'grep -e Uid -e Gid -e Gr -e Cap -e New "
            "/proc/self/status; cat /proc/self/uid_map /proc/self/gid_map'",
            flows=(USERNS,),
        )
        for word in ("uid:0", "uid:1234", "gid:5", "gid:5,uid:1234 -p", "uid:x")
    ),
    *(
        Case(f"exec --security {word} {{sif}} true", differs={"status": SETTING, "said": SETTING})
        for word in ("bad", "bad:x", "seccomp:")
    ),
    Case(
        "exec --security seccomp:/etc/apptainer/seccomp-profiles/default.json {sif} "
        "sh -c 'grep -e Cap -e NoNewPrivs -e Seccomp: -e Groups /proc/self/status'",
        differs={"stdout@root": INH},
    ),
    Case("exec -i {sif} true"),
    Case("exec {sif} true", env={"APPTAINER_CONTAIN": "1", "APPTAINER_HOSTNAME": "envbox"}),
    Case("exec {sif} sh -c 'uname -n'", env={"APPTAINER_HOSTNAME": "envbox"}),
    Case("exec {sif} sh -c 'uname -n'", env={"SINGULARITY_HOSTNAME": "oldbox"}),
    Case("exec {sif} cat /proc/self/uid_map", flows=(SETUID,)),
    Case("exec {sif} cat /proc/self/uid_map", flows=(USERNS,)),
]

MOUNTS = [
    *(mounted("", f"{{{name}}}") for name in ("sif", "zstd", "squash", "sandbox", "plain")),
    *(mounted(options) for options in (
        "-c", "-C", "-p", "-i", "--no-home", "-H {other}", "-H {other}:/h", "-c -H {other}:/h",
        "-B {data}", "-B {data}:/mnt:ro", "-B {data}:/new/deep", "-B {data}/file:/mnt/f",
        "-S /scr", "-c -W {away}", "-c -W {away} -S /scr", "--hostname box",
        "--no-mount sys", "--no-mount dev", "--no-mount home", "--no-mount tmp",
        "--no-mount cwd", "--no-mount bind-paths", "--no-mount /etc/hosts", "--no-mount devpts",
        "-c --no-mount devpts", "-c --no-mount dev", "-c --no-mount tmp,home",
        "-c -B /dev/full", "-B /dev/full:/mnt/full",
    )),
    mounted("--writable-tmpfs", differs={"mounts": LAYER}),
    mounted("--compat", differs={"mounts": LAYER}),
    mounted("-w", "{linked}"),
    mounted("--underlay -B {data}:/new/deep", differs={"said": "a warning has a prefix"}),
    mounted("", cwd="{data}/inner"),
    mounted("", cwd="/usr/share/doc"),
    mounted("", cwd="/srv"),
    mounted("-B {data}:{work}"),
    mounted("-B {data}:/srv", cwd="/srv"),
    mounted("-B {data}:/tmp", cwd="/tmp"),
    mounted("-c -H {other}:/tmp"),
    mounted("", "{onetmp}"),
    mounted("-c", "{onetmp}"),
]  # fmt: skip

PROCESS = [
    *(payload(options) for options in (
        "", "-e", "-c", "-C", "-p", "-p --no-init", "-i", "--uts", "-p -i --uts",
        "--hostname box", "--no-umask", "--no-privs", "--no-home", "--no-pid -C",
        "--drop-caps CAP_CHOWN,sys_resource", "--drop-caps all", "-B {data}:/mnt", "-W {away} -c",
        "-S /scr", "-H {other}:/h", "--no-eval", "--app foo", "--pwd /etc", "--cwd /tmp",
        "--env A=1,B=2", "--env-file {env}", "--no-mount tmp,home", "--no-mount bind-paths",
        "--no-init", "--no-nv", "--no-rocm", "--mount type=bind,src={data},dst=/mnt",
    )),
    *(payload("", f"{{{name}}}") for name in ("zstd", "squash", "sandbox", "plain", "dash")),
    payload("-w", "{linked}"),
    payload("--compat", differs={"mounts": LAYER}),
    payload("--underlay", differs={"said": "a warning has a prefix"}),
    payload("", umask=0o077),
    payload("-e", env={"APPTAINERENV_X": "y", "Z": "1"}),
]  # fmt: skip

LIBS = "sh -c 'ls /.singularity.d/libs'"
LATER = "the real one says which file of its own session it could not mount"
NO_CLI = "a hint how to go on follows"
DRIVERS = [
    *(
        Case(f"exec {option} {{sif}} {LIBS}")
        for option in (
            "--nv",
            "--rocm",
            "--nv --rocm",
            "-c --nv",
            "--nv --no-nv",
            "--nv --no-rocm",
            "--containlibs /lib/x86_64-linux-gnu/libm.so.6",
            "--containlibs /lib/x86_64-linux-gnu/libm.so.6,/lib/x86_64-linux-gnu/libc.so.6",
            "--nv --containlibs /lib/x86_64-linux-gnu/libm.so.6",
        )
    ),
    environment("exec --nv {sif} env"),
    environment("exec {sif} env", env={"APPTAINER_NV": "1"}),
    Case(f"exec {{sif}} {LIBS}", env={"SINGULARITY_ROCM": "1"}),
    Case(f"exec {{sif}} {LIBS}", env={"SINGULARITY_ROCM": "true", "APPTAINER_ROCM": "false"}),
    Case("exec --nvccli {sif} true", flows=BOTH),
    Case("exec -c --nvccli {sif} true", flows=BOTH),
    Case("exec --containlibs /nonexistent {sif} true", differs={"said": LATER}),
]
# What a container says of itself, started from another one or with its names taken.
OUTER = {
    "APPTAINER_NAME": "outer.sif", "APPTAINER_CONTAINER": "/outer.sif",
    "SINGULARITY_NAME": "outer.sif", "SINGULARITY_CONTAINER": "/outer.sif",
    "APPTAINER_ENVIRONMENT": "/outer", "APPTAINER_COMMAND": "shell", "PS1": "outer> ",
    "PROMPT_COMMAND": 'PS1="outer> "; unset PROMPT_COMMAND', "USER_PATH": "/outer",
    "LD_LIBRARY_PATH": "/.singularity.d/libs",
}  # fmt: skip
NESTED = [
    *(
        environment(line, env=OUTER)
        for line in (
            "exec {sif} env",
            "exec -e {sif} env",
            "exec -C {sif} env",
            "exec {dash} env",
            "exec --no-eval {sif} env",
            "exec -p {sif} env",
        )
    ),
    *(
        environment(f"exec {{{name}}} env", env=env)
        for name in ("sif", "dash")
        for env in (
            {"APPTAINERENV_PS1": "mine> "},
            {"PS1": "host> "},
            {"APPTAINERENV_USER_PATH": "mine"},
            {"APPTAINERENV_APPTAINER_COMMAND": "forged"},
            {"APPTAINERENV_APPTAINER_BIND": "forged"},
            {"SINGULARITYENV_LD_LIBRARY_PATH": "/old"},
            {"SINGULARITYENV_PREPEND_PATH": "/old", "APPTAINERENV_APPEND_PATH": "/new"},
            {"APPTAINERENV_X": "new", "SINGULARITYENV_X": "new"},
            {"APPTAINERENV_PROMPT_COMMAND": "date"},
            {"APPTAINERENV_SHELL": "/bin/mine", "SHELL": "/bin/host"},
            {"APPTAINERENV_APPTAINER_SHELL": "/bin/mine"},
            {"APPTAINERENV_APPTAINER_APPNAME": "mine"},
            {"APPTAINERENV_LANG": "C", "LANG": "xx", "LC_ALL": "C"},
            {"APPTAINERENV_APPTAINER_NAME": "forged"},
            {"APPTAINERENV_SINGULARITY_CONTAINER": "forged"},
            {"APPTAINERENV_SINGULARITY_NAME": "forged"},
            {"APPTAINERENV_APPTAINER_CONTAINER": "forged"},
        )
    ),
    *(
        environment("exec {sif} env", env=env)
        for env in (
            {"APPTAINER_BIND": "{data}", "SINGULARITY_BIND": "{other}"},
            {"SINGULARITY_BINDPATH": "{other}"},
            {"APPTAINER_BIND": "{data}", "APPTAINER_BINDPATH": "{other}:/mnt"},
            {"APPTAINER_NO_EVAL": "1", "APPTAINERENV_X": "$(id)"},
            {"SINGULARITY_CLEANENV": "1", "X": "host", "APPTAINERENV_Y": "kept"},
            {"SINGULARITY_CLEANENV": "1", "APPTAINER_CLEANENV": "0", "X": "host"},
        )
    ),
    environment(
        "exec {sif} env",
        env={"APPTAINERENV_PWD": "/x"},
        differs={"stdout": "PWD is the directory in which the payload is"},
    ),
    environment("shell {dash}", stdin="env\n"),
    environment("shell --shell /bin/sh {dash}", stdin="env\n"),
    environment("run {plain} -c env", env={"APPTAINERENV_X": "run"}),
]
RUN_HELP = [
    *(
        Case(f"run-help {words}", flows=(SETUID,))
        for words in (
            "{sif}",
            "--app foo {sif}",
            "--app nope {sif}",
            "{zstd}",
            "{squash}",
            "{sandbox}",
            "{plain}",
            "/nonexistent",
        )
    ),
]

# Layers, instances, --fakeroot, networks, limits: what a line can show of them.
LAYERS = [
    *(
        Case(f"exec --overlay {words} {{sif}} sh -c 'cat /etc/test-release; touch /etc/new'")
        for word in ("sandbox", "squash", "zstd")
        for words in (f"{{{word}}}:ro",)
    ),
    Case("exec --overlay {squash}:ro --overlay {sandbox}:ro {sif} cat /etc/test-release"),
    Case("exec --overlay {squash}:ro -B {data}:/none/such {sif} ls /none/such"),
    Case("exec --overlay /nonexistent {sif} true"),
    Case("exec --overlay /nonexistent:ro {sif} true"),
    Case("exec --overlay '' {sif} true"),
    Case("exec --overlay {sif} {sif} true", differs={"said": READ_ONLY}),
    Case("exec --overlay /etc/hostname {sif} true"),
    Case("exec --overlay {sandbox}:odd {sif} true"),
    Case("exec --overlay {squash}:ro --writable-tmpfs {sif} sh -c 'echo w >/w; cat /w'"),
    Case("exec -B {squash}:/m:image-src=/etc {sif} cat /m/test-release"),
    Case("exec -B {squash}:/m:image-src=/none {sif} true", differs={"said": SHORTER}),
    Case("exec -B {squash}:/m:id=0 {sif} true", differs={"said": SOONER}),
    Case("exec -B {sif}:/m:image-src=/ {sif} true"),
    Case("exec -B {squash}:/m:image-src=/etc/test-release {sif} true"),
]
INSTANCES = [
    Case("instance list"),
    Case("instance list --json"),
    Case("instance list nothing*"),
    *(Case(f"instance list '{name}'") for name in ("[", "[]a]", "[-a]", "a\\", "[^a-c]x")),
    Case("instance stop '[a'"),
    Case("instance stop"),
    Case("instance stop nothing"),
    Case("instance stop --all"),
    Case("instance stats nothing"),
    Case("instance start {sif}", differs={"stdout": HELP}),
    Case("instance start /nonexistent name"),
    Case("exec instance://nothing true"),
    Case("run instance://nothing"),
    Case("shell instance://nothing"),
    sequence(
        "instance start {sandbox} one a b",
        f"exec instance://one sh -c '{PAYLOAD}'",
        "instance stop one",
        form="payload",
    ),
    sequence(
        "instance start --contain -B {data}:/d --env A=1 --no-home {sif} one",
        f"exec --env B=2 instance://one sh -c '{PAYLOAD}'",
        "instance stop one",
        form="payload",
        differs={"said@setuid": MISSING, "said@userns": MISSING},
    ),
    sequence(
        "instance start {sandbox} one",
        "instance start {sandbox} two",
        "instance list",
        "instance list --json",
        "instance list t*",
        "instance list --logs one",
        "instance stop t*",
        "instance list",
        "instance stop one",
        form="instances",
    ),
    sequence("instance start {sif} one", "instance start {sif} one", "instance stop -F one"),
    sequence(
        "instance start --pid-file {own}/pid {sif} one",
        "exec {sif} test -s {own}/pid",
        "run instance://one",
        "shell instance://one -c 'echo shell; exit 4'",
        "exec --pwd /etc instance://one pwd",
        "exec instance://one sh -c 'exit 7'",
        "exec instance://one nonexistent",
        "instance stop -s KILL one",
        "exec instance://one true",
    ),
    sequence(
        "instance start --hostname box {sif} one",
        "exec instance://one cat /proc/sys/kernel/hostname",
        "instance stop --timeout 3 one",
    ),
    sequence(
        "instance start {sif} one",
        "exec --memory 1G --cpus 1 instance://one echo joined",
        "instance stop o[^a-m]e",
    ),
    sequence("instance start {sif} one", "instance stop --user root one", flows=(ROOT,)),
    sequence("instance run {sandbox} one", "exec instance://one true", "instance stop one"),
    sequence(
        "instance start --writable-tmpfs {sif} one",
        "exec instance://one sh -c 'echo kept >/new'",
        "exec instance://one cat /new",
        "instance stop one",
    ),
    *(sequence(f"instance start {{sif}} {name}") for name in ("a/b", "'a b'")),
]
WRITABLE = [
    sequence(
        "exec {sif} mkdir {own}/o",
        "exec --overlay {own}/o {sif} sh -c 'echo kept >/new; rm /etc/test-release; mkdir /etc/d'",
        "exec --overlay {own}/o {sif} sh -c 'cat /new; ls /etc'",
        "exec --overlay {own}/o:ro {sif} sh -c 'cat /new; echo more >/new'",
    ),
    sequence(
        "overlay create --size 64 {own}/o.img",
        "exec --overlay {own}/o.img {sif} sh -c 'echo kept >/new; chmod 750 /etc'",
        "exec --overlay {own}/o.img {sif} sh -c 'cat /new; stat -c %a /etc'",
        "exec --overlay {own}/o.img:ro {sif} cat /new",
        flows=(USERNS, ROOT),  # the real one hangs in the setuid flow
    ),
    sequence(
        "exec -w {linked} sh -c 'echo w >/written; mkdir /made; cat /written'",
        "exec {linked} sh -c 'cat /written; ls -d /made'",
        "exec -w {linked} sh -c 'rm -r /written /made'",
        "exec {linked} cat /written",
    ),
    sequence(f"exec --writable-tmpfs {{sif}} sh -c 'echo x >/x; {PAYLOAD}'", form="payload",
        differs={"mounts@setuid": LAYER, "mounts@userns": LAYER}),
    sequence("exec {sif} mkdir {own}/o", f"exec --overlay {{own}}/o {{sif}} sh -c '{PAYLOAD}'",
             form="payload"),
    sequence(f"exec -w {{linked}} sh -c '{PAYLOAD}'", form="payload"),
]  # fmt: skip
OTHERS = [
    Case("exec --net --network none {sif} sh -c 'cat /proc/net/dev | wc -l'"),
    Case("exec --dns 192.0.2.1,192.0.2.2 {sif} cat /etc/resolv.conf"),
    Case("exec --dns 192.0.2.400 {sif} true"),
    Case("exec --network none --net --hostname box {sif} cat /etc/hostname"),
    Case("exec --cpuset-cpus x- {sif} true", differs={"said@root": CGROUPFS}),
    *(
        Case(f"exec {words} {{sif}} true")
        for words in (
            "--memory 10x",
            "--memory -1",
            "--cpus x",
            "--cpus -1",
            "--blkio-weight 5",
            "--blkio-weight-device x",
            "--apply-cgroups /nonexistent",
        )
    ),
    Case("exec -f {sif} id -u", flows=BOTH, differs={"said@setuid": PASSWD}),
    Case("exec -f {sif} cat /proc/self/uid_map", flows=BOTH, differs={"said@setuid": PASSWD}),
    Case("exec -f --ignore-subuid {sif} cat /proc/self/uid_map", flows=BOTH),
    Case(
        "exec -f {sif} sh -c 'grep -e Cap -e NoNewPrivs /proc/self/status'",
        flows=BOTH,
        differs={"said@setuid": PASSWD},
    ),
]

IGNORED = "what the caller ignores stays ignored, as for each program that nohup starts"
ITSELF = "the kernel lays no directory over itself, as it does not for the real one as root"
BELOW_FILE = "a file of the image is not made a directory for what is bound below it"
GONE = "one line says that the current directory has no path"
REMOVED = "mkdir {own}/d; cd {own}/d; rmdir {own}/d"
CLOSED = "a directory that is open is entered without its path"
LINK = "the real one starts in an empty directory of the link's name"
NO_NAME = "the directory is named as it is on the host, without links"
MANY = "as many words as the kernel takes, where the real one's bound is its own"
SMALL = "the real one's language needs more"
DECIMAL_ROOT = {"status@root": CGROUPFS, "said@root": CGROUPFS}
NO_PATH = "who has no PATH has no USER_PATH"
TOO_SMALL = "64 files are the least, and said to be"
SURROUNDINGS = [
    *(
        Case(f"exec {options} {{sif}} sh -c 'ulimit -s; ulimit -Hs'", under=f"ulimit -{limit}")
        for options in ("", "-p")
        for limit in ("s unlimited", "s 100000", "Ss 100000", "Ss 4000")
    ),
    *(
        Case(
            f"exec {{sif}} sh -c 'ulimit -{limit[0]}; ulimit -H{limit[0]}'",
            under=f"ulimit -S{limit}",
        )
        for limit in ("n 64", "n 16", "c 0", "l 0", "t 50", "d 1000", "i 0", "q 0", "e 5")
    ),
    Case(
        "exec {sif} true",
        under="ulimit -n 16",
        differs={"status@root": TOO_SMALL, "said": TOO_SMALL},
    ),
    Case("exec {sif} true", under="ulimit -Sv 200000", differs={"status": SMALL}),
    *(
        Case(
            "exec {sif} sh -c 'for n in 0 1 2 7; do readlink /proc/self/fd/$n; done | cut -d: -f1'",
            under=under,
        )
        for under in ("exec <&-", "exec 2>&-", "exec <&- 2>&-", "exec 7</etc/hostname")
    ),
    *(
        Case("exec {sif} sh -c 'echo x; exit 3'", under=f"exec {redirected}")
        for redirected in (">&-", "<&- >&-", "<&- >&- 2>&-", ">/dev/full", "</dev/full")
    ),
    *(
        Case(
            f"exec {options} cat /dev/zero", under='"$@" | head -c 1 | wc -c; echo ${PIPESTATUS[*]}'
        )
        for options in ("{sif}", "-p {sif}")
    ),
    Case(
        "exec {sif} sh -c 'grep SigIgn /proc/self/status'",
        under="trap '' HUP INT PIPE",
        differs={"stdout": IGNORED},
    ),
    *(
        Case(f"exec {{sif}} sh -c '{command}'", under=under)
        for command in ("pwd; id -u", "exit 3", "kill -9 $$")
        for under in (
            'exec setsid -w "$@"',
            'exec timeout 60 "$@"',
            'exec nohup "$@" 2>/dev/null',
            'exec nice -n 3 "$@"',
            'echo a | xargs "$@"',
            'exec env -u HOME -u USER "$@"',
        )
    ),
    *(
        environment("exec {sif} env", under=under)
        for under in (
            "unset HOME USER",
            "export PATH=",
            "export HOME=/nonexistent",
            "export HOME=relative",
            "export B1=$'a\\nb'",
            "export HOME=",
        )
    ),
    environment("exec {sif} env", under="unset PATH", differs={"stdout": NO_PATH}),
    Case("exec {sif} pwd", under=REMOVED, differs={"said": GONE}),
    Case("run {sif} a", under=REMOVED, differs={"said": GONE}),
    Case("exec -c {sif} pwd", under=REMOVED, differs={"said": GONE}),
    Case("exec --pwd /etc {sif} pwd", under=REMOVED, differs={"said": GONE, "stdout": GONE}),
    Case("exec -B .:/mnt {sif} true", under=REMOVED, differs={"said": GONE, "status": GONE}),
    Case("exec -c -W w {sif} true", under=REMOVED, differs={"said": GONE}),
    Case("build o.sif {sandbox}", under=REMOVED, differs={"said": GONE}, flows=(SETUID,)),
    Case(
        "exec {sif} pwd",
        under="mkdir -p {own}/d/e; cd {own}/d/e; chmod 0 {own}/d",
        differs={"status@setuid": CLOSED, "stdout@setuid": CLOSED, "said@setuid": CLOSED},
    ),
    Case("exec {sif} sh -c 'pwd; ls'", under="cd {work}/link", differs={"stdout": LINK}),
    Case("exec {sif} pwd", under="cd /bin", differs={"stdout": NO_NAME}),
    Case("exec {sif} pwd", under="cd /lib", differs={"said": NO_NAME}),
    Case("exec {sif} sh -c 'pwd | wc -l'", under="mkdir {own}/$'a\\nb'; cd {own}/$'a\\nb'"),
    *(
        Case(f"exec {{sif}} sh -c 'echo $#; echo ${{#1}}' {words}", under=under)
        for words in ("x", "'' ' '")
        for under in (
            'exec "$@" $(seq 1 100000)',
            'exec "$@" $(printf %0130000d 1)',
            "exec \"$@\" $'a\\nb'",
        )
    ),
    Case(
        "exec {sif} sh -c 'echo $#'",
        under='ulimit -s unlimited; exec "$@" $(seq 1 280000)',
        differs={"status": MANY, "stdout": MANY, "said": MANY},
    ),
    *(
        Case(f"exec {options} {{sif}} sh -c 'umask; pwd; ls -ld $HOME | cut -c1-10'", umask=0o777)
        for options in ("", "-c", "-C --hostname box", "-W {away} -c", "-B {data}:/new/deep")
    ),
]
SETTLED = [
    *(
        Case(
            f"exec -B {{data}}{name}:{target} {{sif}} true",
            differs={"status": BELOW_FILE, "said": BELOW_FILE},
        )
        for name, target in (("/file", "/etc/hosts/y"), ("", "/etc/hosts/y"))
    ),
    Case(
        "exec -B {data}:/etc/test-release/y {sif} true",
        differs={"status": BELOW_FILE, "said": BELOW_FILE},
    ),
    *(
        Case(f"exec -B {{data}}{name}:{target} {{sif}} true")
        for name, target in (
            ("/file", "/dev/par-file"),
            ("", "/dev/par-folder"),
            ("/file", "/proc/x"),
            ("", "/sys/x"),
            ("/file", "/dev/null/y"),
        )
    ),
    *(
        Case(
            f"exec --overlay {{sandbox}}{below}:ro {{sandbox}} true",
            differs={"status@setuid": ITSELF, "status@userns": ITSELF, "said": ITSELF},
        )
        for below in ("", "/etc")
    ),
    *(
        Case(f"exec --cpus {value} {{sif}} true")
        for value in ("1e400", "1e-5", "0x1", "1_0", "inf", "nan", "' 1'", "0.009", "-1e1")
    ),
    *(
        Case(f"exec --cpus {value} {{sif}} true", differs=DECIMAL_ROOT)
        for value in ("1e-2", "+1", ".5", "1.", "00.5")
    ),
    *(
        sequence(
            "instance start --env A=1 {sif} one", line, "instance stop one", flows=(SETUID, ROOT)
        )
        for line in (
            "exec --env B=2 instance://one sh -c 'echo $A $B'",
            "exec --env A=2 instance://one sh -c 'echo $A'",
            "exec --env-file {env} instance://one sh -c 'echo $EF1 $EF2 $EF3'",
            "run --env B=2 instance://one a",
            *(
                f"exec {words} instance://one echo joined"
                for words in (
                    "--memory 10x",
                    "--memory -1",
                    "--cpus x",
                    "--cpus 0",
                    "--blkio-weight 5",
                    "--memory-swap x",
                    "--memory 1G",
                    "--apply-cgroups /nonexistent",
                    "--memory 1G --apply-cgroups /nonexistent",
                )
            ),
        )
    ),
]
GROUPS = {
    "surroundings": SURROUNDINGS, "settled": SETTLED,
    "drivers": DRIVERS, "nested": NESTED, "run-help": RUN_HELP,
    "images": IMAGES, "status": STATUS, "environment": ENVIRONMENT, "files": FILES,
    "directory": DIRECTORY, "binds": BINDS, "flags": FLAGS, "mounts": MOUNTS, "process": PROCESS,
    "spellings": SPELLINGS, "bad": BAD, "outside": OUTSIDE, "layers": LAYERS,
    "instances": INSTANCES, "writable": WRITABLE, "others": OTHERS,
}  # fmt: skip
# These groups run by default, in this flow; the others take minutes.
QUICK = frozenset({("process", SETUID), ("process", USERNS), ("images", SETUID), ("bad", SETUID)})
WITHOUT_CONTAINER = (
    "inspect",
    "sif",
    "run-help",
    "config",
    "version",
    "buildcfg",
    "help",
    "completion",
)
# What differs in every line: flow ("" for each), field of /proc/self/status, reason.
EVERYWHERE: tuple[tuple[str, str, str], ...] = (
    (ROOT, "CapInh", INH),
    (ROOT, "CapAmb", INH),
)
KERNELS_OWN = ("sysfs", "proc", "mqueue", "devpts")
# Restrictions that only we have: flag, file systems or a mount point ("" for any), reason.
RESTRICTIONS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("nosuid", (), "the real one leaves /dev, and in a user namespace all binds, as they are"),
    ("nodev", (), "the real one leaves /dev, and in a user namespace all binds, as they are"),
    ("noexec", KERNELS_OWN, "the kernel shows nothing there but its own"),
    ("ro", ("/",), "the root is mounted read-only, not only a read-only overlay"),
)

"""What the help texts say beside the table: descriptions and examples by command."""

from __future__ import annotations

from apptainer_py.cli.table import PROGRAM

_IMAGES = """
An image is a file or a directory:

  *.sif        SIF, as Apptainer and Singularity write it
  *.sqsh       a bare squashfs file system
  directory/   a sandbox, with a whole root file system in it"""
_SPEC = """

What an image is made of (BUILD SPEC) is a definition file, or

  an image, or a directory that holds a root file system
  docker://NAME       an image of layers in a registry, or Docker Hub
  oras://NAME         a SIF file in a registry; library:// and https:// too
  oci:DIR[:TAG]       a layout; oci-archive:FILE, docker-archive:FILE too
  docker-daemon:NAME  an image of Docker on this machine

A definition file says where to begin, and what to do in sections:

  Bootstrap: docker
  From: debian:12

  %files
      tool.py /opt/tool.py
  %post
      apt-get update && apt-get install -y python3
  %environment
      export LC_ALL=C.UTF-8
  %runscript
      exec python3 /opt/tool.py "$@"

Scripts of a definition run as root of the image, not of the machine. Nothing
is left of a build that fails."""
_URIS = """

  docker://NAME       an image of layers in a registry, or Docker Hub
  oras://NAME         a SIF file in a registry
  library://NAME      a SIF file in a library
  https://HOST/FILE   a file
  oci:DIR[:TAG]       a layout; oci-archive:FILE, docker-archive:FILE too"""
ABOUT = {
    "": "Containers for shared machines: an image is started as an ordinary program of the user "
    "who starts it, with the files of that user at hand.",
    "exec": "Starts a command in a container and returns its status. What follows the name of "
    "the command belongs to it." + _IMAGES,
    "run": "Starts what the image was made to start (its runscript), with the arguments that "
    "follow the image." + _IMAGES,
    "shell": "Starts an interactive shell in a container." + _IMAGES,
    "test": "Starts the test script of an image." + _IMAGES,
    "build": "Makes a SIF image, or with --sandbox a directory." + _SPEC,
    "cache": "Shows and removes what pull, build and launches of a URI have fetched: in "
    "~/.apptainer/cache, or where APPTAINER_CACHEDIR says.",
    "cache clean": "Removes fetched images, after a question; --type and --days choose some.",
    "cache list": "Lists how much of each type there is; with -v each entry and what it came from.",
    "delete": "Deletes an image, named library://ENTITY/COLLECTION/IMAGE[:TAG], from a library.",
    "instance": "Starts, lists and stops containers that run in the background. Other commands "
    "reach one as instance://NAME.",
    "instance list": "Lists one's own instances: all of them, or those that fit the name.",
    "instance run": "Starts an image's runscript in the background, under a name." + _IMAGES,
    "instance start": "Starts an image's startscript in the background, under a name." + _IMAGES,
    "instance stats": "Shows processor time, memory, input and output of an instance, again every "
    "second or once.",
    "instance stop": "Stops an instance, those that fit a name, or all of them.",
    "keyserver": "Manages the key servers of remotes: verify asks them for keys that no keyring "
    "has, in their order.",
    "keyserver add": "Adds a key server to the active remote or to another one, for everybody.",
    "keyserver list": "Lists the key servers of each remote, in the order in which they are asked.",
    "keyserver login": "Keeps what a key server wants to know of its user.",
    "keyserver logout": "Forgets what a key server was told.",
    "keyserver remove": "Removes a key server from the active remote or from another one.",
    "oci": "Manages containers of the OCI runtime: made from bundle directories, with an id each.",
    "overlay": "Makes places for the changes that are made to an image, which itself stays.",
    "overlay create": "Makes an ext3 image for --overlay, or adds such a partition to a SIF image.",
    "pull": "Fetches an image into a SIF file, named after the image and its tag if nothing else "
    "is said." + _URIS,
    "push": "Uploads a SIF file: to oras://HOST/NAME:TAG of a registry, or to library://.",
    "registry": "Manages the accounts that registries are asked with, in ~/.docker/config.json.",
    "registry list": "Lists the hosts that an account is kept for, without the accounts.",
    "registry login": "Asks a registry whether it takes an account, and keeps it; oras://HOST is "
    "the same as docker://HOST.",
    "registry logout": "Forgets the account of a registry.",
    "remote": "Manages remotes: names for a library and the key servers that belong to it.",
    "remote add": "Adds a remote, makes it the active one and asks for its token.",
    "remote get-login-password": "Prints the password for the registry that belongs to the active "
    "library.",
    "remote list": "Lists the remotes, and says which one is active.",
    "remote login": "Keeps a token of the active remote or of another one, if it takes that.",
    "remote logout": "Forgets the token of the active remote or of another one.",
    "remote remove": "Removes a remote and its token.",
    "remote status": "Asks the services of a remote how they are, and whether they take the token.",
    "remote use": "Makes a remote the active one.",
    "search": "Asks the library of the active remote for images with these words in their names.",
    "tag": "Gives an image of a registry, docker:// or oras://, one more tag; nothing is copied.",
    "plugin": "Manages plug-ins: Python packages that bring commands of their own. They run with "
    "the rights of who types them; containers have nothing to do with them.",
    "plugin compile": "Packs what the entry points of DIRECTORY/pyproject.toml lead to into a "
    "wheel.",
    "plugin create": "Writes a plug-in with one command, to begin with.",
    "plugin disable": "Takes the commands of a plug-in away; it stays installed.",
    "plugin enable": "Gives a plug-in its commands back.",
    "plugin inspect": "Shows the name, version and commands of a plug-in that is installed, or "
    "lies in a file or directory. Nothing of it is run.",
    "plugin install": "Installs a plug-in, a wheel or an unpacked one, for all users of this "
    "machine, in place of another version of it.",
    "plugin list": "Lists the plug-ins that are installed, and whether they are enabled.",
    "plugin uninstall": "Removes a plug-in.",
    "inspect": "Shows labels, definition file, environment and scripts of an image without "
    "starting it. Several options show several parts; labels are shown if there is none.",
    "run-help": "Prints the text that the image's author wrote for those who run it (%help); --app "
    "prints that of a SCIF application.",
    "key": "Manages the OpenPGP keys that images are signed and verified with: the user's, in "
    "~/.apptainer/keys or where APPTAINER_KEYSDIR says, and the machine's public ones.",
    "key export": "Writes a key to a file. A private key keeps its passphrase there.",
    "key import": "Adds the keys of a file, binary or as text, to a keyring.",
    "key list": "Lists the keys of a keyring.",
    "key newpair": "Makes an RSA key pair and adds it to the user's keyrings.",
    "key pull": "Fetches the public key with a fingerprint from a key server and adds it to a "
    "keyring. Compare the fingerprint with its owner first: a key in there is trusted.",
    "key push": "Sends a public key of a keyring to a key server.",
    "key remove": "Removes the key with a fingerprint from a keyring.",
    "key search": "Asks a key server for the keys with these words in their owner's name.",
    "sign": "Adds a digital signature to a SIF image for each group of its objects, for one group, "
    "or for one object. The key is one of the OpenPGP keyring, or in a PEM file.",
    "verify": "Compares a SIF image with the digital signatures in it. The keys are those of the "
    "OpenPGP keyrings and of a key server, one in a PEM file, or that of a certificate.",
    "sif": "Shows the header of a SIF image and the data objects in it, and changes them.",
    "sif add": "Adds the content of a file to a SIF image.",
    "sif del": "Takes a data object out of the table of a SIF image.",
    "sif new": "Makes a SIF image without data objects.",
    "sif setprim": "Makes a system partition the one that is started.",
    "sif list": "Lists the data objects of a SIF image.",
    "sif header": "Prints the global header of a SIF image.",
    "sif info": "Prints what the table of a SIF image says about one data object.",
    "sif dump": "Writes the content of one data object to stdout.",
    "capability": "Grants capabilities to users and groups, takes them back and shows them. A "
    "payload gets what its user was granted and asks for (--add-caps). Some capabilities are as "
    "good as root's password: grant them to people who may be root.",
    "capability add": "Grants capabilities, separated by commas, to a user or a group; `all` means "
    "each of them.",
    "capability drop": "Takes capabilities, separated by commas, from a user or a group; `all` "
    "means each of them.",
    "capability avail": "Says what capabilities allow: all of them, or those that are named.",
    "capability list": "Shows what users and groups were granted: all of them, or one.",
    "config": "Reads, checks and changes the administrator's configuration file.",
    "config global": "Reads or changes one directive of the configuration file; a directive that "
    "may stand several times has all its values separated by commas.",
    "config fakeroot": "Gives users ranges of subordinate ids in /etc/subuid and /etc/subgid, "
    "and takes them away, for --fakeroot; all other lines stay as they are.",
    "config check": "Lists what is wrong with the configuration file, what in it is not enforced, "
    "and why the setuid flow is refused.",
    "config show": "Prints the configuration with the origin of each value; --effective prints "
    "what follows from it, --user for one user.",
    "buildcfg": "Prints the paths and names that are compiled in, or one of them.",
    "completion": "Prints a script that lets a shell complete commands and options.",
    "completion bash": f"To have it at hand:\n\n  source <({PROGRAM} completion bash)",
    "completion zsh": f"To have it at hand:\n\n  source <({PROGRAM} completion zsh)",
    "completion fish": f"To have it at hand:\n\n  {PROGRAM} completion fish | source",
    "help": "Prints the help text of a command.",
    "version": "Prints the version of this program.",
}
EXAMPLES = {
    "": ("help exec", "exec image.sif cat /etc/os-release"),
    "exec": (
        "exec image.sif cat /etc/os-release",
        "exec --bind /data:/mnt:ro image.sif ls /mnt",
        "exec --containall --env LEVEL=2 sandbox/ env",
    ),
    "run": ("run image.sif", "run --app analysis image.sif --fast input.csv"),
    "shell": ("shell image.sif", "shell --shell /bin/bash --no-home image.sif"),
    "test": ("test image.sif",),
    "build": (
        "build image.sif image.def",
        "build --sandbox directory/ docker://debian:12",
        "build --build-arg VERSION=2 image.sif image.def",
    ),
    "pull": ("pull docker://debian:12", "pull tool.sif oras://HOST/lab/tool:1"),
    "push": ("push image.sif oras://HOST/lab/image:1",),
    "registry login": ("registry login docker://HOST",),
    "instance start": (
        "instance start image.sif web",
        "exec instance://web ps",
        "instance stop web",
    ),
    "cache clean": ("cache clean --days 30", "cache clean --type oci-tmp --force"),
    "overlay create": (
        "overlay create --size 512 changes.img",
        "shell --overlay changes.img image.sif",
    ),
    "tag": ("tag oras://HOST/lab/image:1 latest",),
    "inspect": ("inspect image.sif", "inspect --json --runscript image.sif"),
    "plugin": (
        "plugin create greeting greet",
        "plugin compile -o greet.whl greeting",
        "plugin install greet.whl",
    ),
    "sif": ("sif list image.sif", "sif dump 1 image.sif > image.def"),
    "key newpair": ("key newpair", "key list --secret"),
    "sign": ("sign image.sif", "sign --key private.pem image.sif"),
    "verify": ("verify image.sif", "verify --key public.pem image.sif"),
    "config fakeroot": ("config fakeroot --add alice", "config fakeroot --disable alice"),
    "config global": (
        "config global --get 'bind path'",
        "config global --set 'bind path' /etc/resolv.conf",
    ),
    "config show": ("config show --effective --user alice",),
}

#!/usr/bin/env bash
# Put into .device/ all that this project needs on a machine with a GPU, torch, Python 3.12 and no network.
#
#   bash tools/gpu/device_kit.sh                 # wheels as they come, about 54 MiB
#   bash tools/gpu/device_kit.sh --small         # the same packages in one archive, about 33 MiB, takes 2 minutes
#   bash tools/gpu/device_kit.sh --small wandb   # and more packages, by name
#
# A copy of the working tree with .device/ in it then is all that device_run.sh needs there. Versions are those of
# constraints.txt. git ignores .device/, and .device_cache/, where packages are kept and which need not be copied.
set -euo pipefail

PYTHON=${PYTHON:-python3}
KIT=.device
CACHE=.device_cache
# What an installation of torch with tools for machine learning seldom has, each with what it needs.
PACKAGES=(polars polars-runtime-32 omegaconf rich markdown-it-py mdurl pygments tabm rtdl_num_embeddings rtdl_revisiting_models)

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
small=
for argument in "$@"; do
    case $argument in
    --small) small=yes ;;
    -*) echo "error: unknown option $argument" >&2 && exit 2 ;;
    *) PACKAGES+=("$argument") ;;
    esac
done

mkdir -p "$CACHE" "$KIT"
rm -rf "$KIT/wheels" "$KIT/site.tar.xz"

pinned() { # NAME: the version in constraints.txt, as ==VERSION; nothing where it has none
    "$PYTHON" - "$1" <<'PY'
import re, sys
wanted = re.sub(r"[-_.]+", "-", sys.argv[1]).lower()
for line in open("constraints.txt"):
    name, equals, version = line.strip().partition("==")
    if equals and re.sub(r"[-_.]+", "-", name).lower() == wanted:
        print(f"=={version}")
PY
}

platforms=()
for tag in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
chosen=()
for name in "${PACKAGES[@]}"; do
    stem=${name//-/_}
    wanted="$name$(pinned "$name")"
    version=${wanted#*==}
    # Without a version, or with one that is not there yet: fetch it.
    if [[ $version == "$wanted" ]] || ! compgen -G "$CACHE/$stem-$version-*.whl" >/dev/null; then
        find "$CACHE" -iname "$stem-*.whl" -delete
        "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
            --implementation cp "${platforms[@]}" -d "$CACHE" "$wanted" >"$CACHE/pip.log" 2>&1 ||
            # Some packages of plain Python come as source alone: make the wheel here.
            "$PYTHON" -m pip wheel -q --disable-pip-version-check --no-deps -w "$CACHE" "$wanted" >>"$CACHE/pip.log" 2>&1 || {
            cat "$CACHE/pip.log" >&2
            exit 1
        }
    fi
    chosen+=("$(find "$CACHE" -iname "$stem-*.whl" | head -n 1)")
done

if [[ $small ]]; then
    archive="$CACHE/site-$(printf '%s\n' "${chosen[@]}" | sha256sum | cut -c1-12).tar.xz"
    if [[ ! -f $archive ]]; then
        unpacked=$(mktemp -d)
        "$PYTHON" - "$unpacked" "${chosen[@]}" <<'PY'
import sys, zipfile
for wheel in sys.argv[2:]:
    with zipfile.ZipFile(wheel) as archive:
        if any(".data/" in name for name in archive.namelist()):
            sys.exit(f"error: {wheel} has files that only an installer puts in their place: do without --small")
        archive.extractall(sys.argv[1])
PY
        tar -C "$unpacked" -cf - . | xz -6 -T0 >"$archive.part"
        mv "$archive.part" "$archive"
        rm -r "$unpacked"
    fi
    cp "$archive" "$KIT/site.tar.xz"
else
    mkdir "$KIT/wheels"
    cp "${chosen[@]}" "$KIT/wheels/"
fi
# LIMIT_MIB: an error where all files that are copied to the machine are more than this.
"$PYTHON" - "$KIT" "${LIMIT_MIB:-inf}" <<'PY'
import os, subprocess, sys
kit, limit = sys.argv[1], float(sys.argv[2])
names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True, text=True, check=True).stdout
tree = sum(os.lstat(n).st_size for n in names.split("\0") if n and os.path.lexists(n))
carried = sum(os.lstat(os.path.join(d, f)).st_size for d, _, files in os.walk(kit) for f in files)
print(f"working tree {tree / 2**20:.1f} MiB + {kit} {carried / 2**20:.1f} MiB = {(tree + carried) / 2**20:.1f} MiB to copy")
if (tree + carried) / 2**20 > limit:
    sys.exit("error: that is too much: try --small, or leave files out of the working tree")
PY
echo "on the machine with the GPU, with $KIT copied along: bash tools/gpu/device_run.sh"

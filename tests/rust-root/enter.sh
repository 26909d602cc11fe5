# Runs a command in a root directory that has another release's compiler, in
# a mount namespace of its own, so that nothing stays mounted afterwards. Output
# and errors are one stream.
# Arguments: the root, the workspace, cargo's home, the target directory, and the
# command.
set -eu
PATH=/usr/sbin:/sbin:$PATH
root=$1 workspace=$2 home=$3 target=$4
shift 4

# The workspace has its own path there: cargo knows sources by path and time, and
# would take those of another checkout for this one's.
mkdir -p "$root$workspace"

# Binds are recursive, which a user namespace insists on.
for directory in /dev /proc; do
	mount --rbind "$directory" "$root$directory"
done
mount --rbind "$workspace" "$root$workspace"
mount --rbind "$home" "$root/cargo"
mount --rbind "$target" "$root/target"
# What is not in cargo's home yet is downloaded as on the host.
for file in /etc/resolv.conf /etc/hosts; do
	[ ! -e "$file" ] || cp "$file" "$root$file"
done

exec chroot "$root" env -i \
	PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
	CARGO_HOME=/cargo CARGO_TARGET_DIR=/target CARGO_INCREMENTAL=0 RUSTC_WRAPPER= \
	${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
	${HTTPS_PROXY:+HTTPS_PROXY="$HTTPS_PROXY"} ${no_proxy:+no_proxy="$no_proxy"} \
	sh -c 'cd "$0" && exec "$@" 2>&1' "$workspace" "$@"

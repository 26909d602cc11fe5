#!/bin/sh
# Runs at the end of mmdebstrap, outside the chroot but as its root user.
# $1 is the chroot; OUT is a directory that this user may write to, with an
# empty root.img of the wanted size in it; INIT is the guest's init script.
set -eu
PATH=/usr/sbin:/sbin:$PATH
root=$1

install -m 0755 "$INIT" "$root/vm-init"
mkdir -p "$root/payload" "$root/mnt"
echo ublk-vm > "$root/etc/hostname"
: > "$root/etc/fstab"

# Nothing of this is used in a guest that is thrown away.
find "$root/var/cache/apt" "$root/var/lib/apt/lists" -type f -delete
rm -f "$root"/boot/initrd.img-* "$root"/boot/System.map-*

echo "STEP taking out kernels and headers"
for kernel in "$root"/boot/vmlinuz-*; do
	version=${kernel##*/vmlinuz-}
	test -e "$root/usr/lib/modules/$version/modules.dep" || chroot "$root" depmod "$version"
	cp "$kernel" "$OUT/vmlinuz-$version"
done
tar -C "$root/usr/include" -cf "$OUT/headers.tar" linux asm-generic
tar -C "$root/usr/include/x86_64-linux-gnu" -rf "$OUT/headers.tar" asm

chroot "$root" dpkg-query --show --showformat '${Package} ${Version}\n' > "$OUT/packages"

echo "STEP making the file system"
# The chroot has /proc, /sys and /dev mounted in it: a bind mount that is not
# recursive shows the tree without them.
bare=$(mktemp -d)
mount --bind "$root" "$bare"
trap 'umount "$bare" && rmdir "$bare"' EXIT
# The partition starts at 1 MiB, see `image.rs`. The image is only ever
# written through a throw-away overlay, so a journal would be of no use.
mkfs.ext4 -q -F -L ublk-root -O ^has_journal,^resize_inode -m 0 \
	-E offset=1048576,nodiscard,lazy_itable_init=1 \
	-d "$bare" "$OUT/root.img" "$FS_KIB"k

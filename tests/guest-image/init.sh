#!/bin/sh
# Init of the guest: mounts what programs expect, starts udev, then runs the
# agent from the payload disk. It stays process 1, and waiting for the agent
# it also reaps orphans.
PATH=/payload:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
export PATH HOME=/root

mount -t devtmpfs -o nosuid,mode=0755 dev /dev
exec < /dev/console > /dev/console 2>&1
give_up() {
	echo "vm-init: $*"
	echo o > /proc/sysrq-trigger
	# Power-off is under way; process 1 must not end before it.
	while :; do read -r _ || sleep 60; done
}
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mkdir -p /dev/pts /dev/shm
mount -o remount,noatime /
mount -t devpts -o nosuid,noexec,gid=5,mode=0620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev shm /dev/shm
mount -t tmpfs -o nosuid,nodev,mode=0755 run /run
mount -t tmpfs -o nosuid,nodev tmp /tmp
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t configfs configfs /sys/kernel/config 2> /dev/null
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
	[ -e "/dev/${link%%:*}" ] || ln -s "${link#*:}" "/dev/${link%%:*}"
done
hostname ublk-vm

# Emulated guests boot with one CPU, see `qemu.rs`.
for online in /sys/devices/system/cpu/cpu*/online; do
	[ -e "$online" ] && echo 1 > "$online"
done
ip link set lo up 2> /dev/null

/usr/lib/systemd/systemd-udevd --daemon || echo "vm-init: no udevd"
udevadm trigger --action=add --subsystem-match=block --subsystem-match=nvme --subsystem-match=misc

# The payload is namespace 2 of the controller with the root disk. Namespaces
# are scanned in the background and in parallel: the payload may come a moment
# later than root, and the number in the device's name is not the namespace's.
mount_payload() {
	for controller in /sys/class/nvme/nvme*; do
		read -r serial < "$controller/serial" || continue
		[ "$serial" = ublk-root ] || continue
		for namespace in "$controller"/nvme*n*; do
			read -r nsid < "$namespace/nsid" || continue
			[ "$nsid" = 2 ] || continue
			mount -t ext4 -o ro "/dev/${namespace##*/}" /payload && return 0
		done
	done
	return 1
}
tries=0
until mount_payload 2> /run/payload.log; do
	tries=$((tries + 1))
	[ "$tries" -le 300 ] || give_up "cannot mount the payload: $(cat /run/payload.log)"
	sleep 0.1
done
udevadm settle --timeout=60

/payload/vm-agent
give_up "the agent ended with status $?"

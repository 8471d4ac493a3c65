#!/bin/bash
# The first process of a private host: hides the machine's own libvirt behind empty folders, then only
# stays, and reaps what ends (QEMU is nobody's child once libvirtd has started it).
#
#   host_init.sh FOLDER CHECKOUT HOSTNAME
#
# Runs in mount, PID, UTS and network namespaces of its own (host.py makes them). All that the host writes
# lands in FOLDER; FOLDER/ready appears when the host can be entered.
set -eu
folder=$1 checkout=$2
mount --make-rprivate /
hostname "$3"
ip link set lo up
for place in /run /var/cache /var/lib /var/log; do
    mkdir -p "$folder$place"
    case $checkout in
        "$place"/*) # a checkout that lies below stays in sight
            mkdir -p "$folder$checkout"
            mount --bind "$checkout" "$folder$checkout"
            ;;
    esac
    mount --rbind "$folder$place" "$place"
done
for place in /etc/libvirt /etc/passwd /etc/group; do
    mount --bind "$folder$place" "$place"
done
[ ! -d "$folder/capabilities" ] || mount --bind "$folder/capabilities" /var/cache/libvirt
touch "$folder/ready"
while :; do
    sleep infinity &
    wait $!
done

# Printed once, where somebody logs in at a terminal of dom0.
if [ -t 0 ] && [ -z "$GALVAN_BANNER" ]; then
  export GALVAN_BANNER=1
  printf '\n'
  if [ "$(cat /sys/hypervisor/type 2>/dev/null)" = xen ]; then
    printf 'This is dom0 of %s: Debian %s on a hypervisor that speaks the Xen ABI.\n' \
      "$(sed -n 's/.*[-. ]\([Gg]alvan[^ ]*\).*/\1/p' /sys/hypervisor/version/extra 2>/dev/null | grep . || echo Xen)" \
      "$(cat /etc/debian_version)"
    printf 'It owns the hardware; guests run beside it, on the bridge xenbr0.\n'
    # While dom0 is still coming up, the guest is on its way: this waits for it.
    case "$(systemctl is-system-running 2>/dev/null)" in
      initializing | starting)
        printf 'The guest "demo" is being started ...\n'
        systemctl start galvan-demo.service 2>/dev/null
        ;;
    esac
    if xl domid demo >/dev/null 2>&1; then
      printf 'The guest "demo" (Debian 13) is running.\n'
    else
      printf 'The guest "demo" is not running; "systemctl status galvan-demo" says why.\n'
    fi
    printf '\nTry:\n'
    printf '  xl list            the domains and what they use\n'
    printf '  xl console demo    the console of the guest (leave with Ctrl-])\n'
    printf '  xl dmesg           the log of the hypervisor\n\n'
  else
    printf 'This Debian was started without its hypervisor: there are no guests here.\n\n'
  fi
fi

package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"redoubt.dev/redoubt/spec"
)

// A HostLink is an interface of the host that is moved into a tenant's network while Redoubt runs.
type HostLink struct {
	ID     int    // 0 and on, of nobody else in any network
	Tenant string // "": the default one
	Name   string // of the interface
	VLAN   uint16 // the only one, untagged; 0: a trunk that carries all with tags
}

// Uplink is what it is in the network.
func (h HostLink) Uplink() Uplink { return Uplink{ID: h.ID, VLAN: h.VLAN} }

// maxUplinks bounds them.
const maxUplinks = 16

// ParseUplinks reads a list such as "eth1,eth2:10,acme=eth3:20". No interface is there twice.
func ParseUplinks(text string) ([]HostLink, error) {
	var all []HostLink
	for item := range strings.SplitSeq(text, ",") {
		if item == "" {
			continue
		}
		tenant, link, other := strings.Cut(item, "=")
		if !other {
			tenant, link = "", item
		} else if !spec.ValidName(tenant) {
			return nil, fmt.Errorf("%q: %q is no tenant's name", item, tenant)
		}
		name, vlan, tagged := strings.Cut(link, ":")
		u := HostLink{ID: len(all), Tenant: tenant, Name: name}
		if tagged {
			v, err := strconv.ParseUint(vlan, 10, 16)
			if err != nil || v < 1 || v > MaxVLAN {
				return nil, fmt.Errorf("%q: VLAN %q: use 1 to %d", item, vlan, MaxVLAN)
			}
			u.VLAN = uint16(v)
		}
		// dev_valid_name() of Linux; 15 bytes are IFNAMSIZ less its NUL.
		if name == "" || name == "." || name == ".." || len(name) > 15 || strings.ContainsAny(name, "/ \t\n\v\f\r") {
			return nil, fmt.Errorf("%q is not IFACE, IFACE:VLAN or TENANT=…", item)
		}
		if slices.ContainsFunc(all, func(o HostLink) bool { return o.Name == name }) {
			return nil, fmt.Errorf("%s is there twice", name)
		}
		if all = append(all, u); len(all) > maxUplinks {
			return nil, fmt.Errorf("more than %d", maxUplinks)
		}
	}
	return all, nil
}

// ParseQuarantine reads a quarantine such as "4000" or "4000=192.0.2.1,2001:db8::1": its VLAN, and the remediation
// addresses. Nothing is the zero value.
func ParseQuarantine(text string) (q Quarantine, err error) {
	if text == "" {
		return q, nil
	}
	number, list, named := strings.Cut(text, "=")
	vlan, err := strconv.ParseUint(number, 10, 16)
	if err != nil || vlan < 1 || vlan > MaxVLAN {
		return q, fmt.Errorf("%q: use VLAN or VLAN=ADDRESS,…, with a VLAN of 1 to %d", text, MaxVLAN)
	}
	q.VLAN = uint16(vlan)
	if named {
		for item := range strings.SplitSeq(list, ",") {
			a, err := netip.ParseAddr(item)
			if err != nil {
				return Quarantine{}, fmt.Errorf("%q: %q is no address", text, item)
			}
			q.Remediation = append(q.Remediation, a)
		}
	}
	return q, q.check()
}

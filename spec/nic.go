package spec

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// A NIC is a network device in one VLAN of Redoubt's network.
type NIC struct {
	VLAN      int      `yaml:"vlan,omitempty" json:"vlan,omitempty" jsonschema:"minimum=1,maximum=4094,default=1"`
	MAC       string   `yaml:"mac,omitempty" json:"mac,omitempty" jsonschema:"pattern=^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$,description=default: made from the guest's UUID"`
	Addresses []string `yaml:"addresses,omitempty" json:"addresses,omitempty" jsonschema:"maxItems=16,description=IPv4 and IPv6 addresses; with any the guest can send from these and link-local ones only"`
}

// ParseNIC reads a NIC of the command line: vlan=10,mac=02:00:00:00:00:01,address=192.0.2.1, each part
// of which may be missing, and address repeated. The values are for [Guest.Complete] to check.
func ParseNIC(text string) (NIC, error) {
	var n NIC
	for part := range strings.SplitSeq(text, ",") {
		if part == "" {
			continue
		}
		name, value, ok := strings.Cut(part, "=")
		switch {
		case !ok || value == "":
			return n, fmt.Errorf("%q is not vlan=, mac= or address=", part)
		case name == "vlan" && n.VLAN == 0:
			v, err := strconv.Atoi(value)
			if err != nil || v < 1 {
				return n, fmt.Errorf("vlan: %q: use 1 to %d", value, MaxVLAN)
			}
			n.VLAN = v
		case name == "mac" && n.MAC == "":
			n.MAC = value
		case name == "address":
			n.Addresses = append(n.Addresses, value)
		default:
			return n, fmt.Errorf("%q is there twice, or is not vlan=, mac= or address=", part)
		}
	}
	return n, nil
}

// complete fills in the defaults and checks.
func (n *NIC) complete(field string, bad func(field, format string, args ...any) error) error {
	if n.VLAN == 0 {
		n.VLAN = 1
	}
	if n.VLAN < 1 || n.VLAN > MaxVLAN {
		return bad(field+".vlan", "%d: use 1 to %d", n.VLAN, MaxVLAN)
	}
	if n.MAC != "" {
		m, err := net.ParseMAC(n.MAC)
		if err != nil || len(m) != 6 || len(n.MAC) != 17 {
			return bad(field+".mac", "%q: use six bytes such as 02:00:00:00:00:01", n.MAC)
		}
		if m[0]&1 != 0 || [6]byte(m) == [6]byte{} {
			return bad(field+".mac", "%s: is no station's address", n.MAC)
		}
		n.MAC = m.String()
	}
	if len(n.Addresses) > MaxAddresses {
		return bad(field+".addresses", "%d: the most is %d", len(n.Addresses), MaxAddresses)
	}
	for i, a := range n.Addresses {
		ip, err := netip.ParseAddr(a)
		switch {
		case err != nil || ip.Zone() != "" || ip.Is4In6():
			return bad(fmt.Sprintf("%s.addresses[%d]", field, i), "%q: use an IPv4 or IPv6 address without a prefix length", a)
		case ip.IsMulticast() || ip.IsUnspecified() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			return bad(fmt.Sprintf("%s.addresses[%d]", field, i), "%s: is no station's address", a)
		}
		n.Addresses[i] = ip.String()
	}
	return nil
}

// DefaultMAC is the address of a guest's NIC that has none in the spec: always the same, locally
// administered, and as good as never another guest's.
func DefaultMAC(uuid string, index int) net.HardwareAddr {
	sum := sha256.Sum256(fmt.Appendf(nil, "redoubt nic %s %d", uuid, index))
	m := net.HardwareAddr(sum[:6])
	m[0] = m[0]&^1 | 2
	return m
}

package network

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

// TestPlan: configurations and their plans, as text.
func TestPlan(t *testing.T) {
	datadriven.RunTest(t, "testdata/plan", func(t *testing.T, d *datadriven.TestData) string {
		c, err := parseConfig(d.Input)
		if err != nil {
			d.Fatalf(t, "%v", err)
		}
		p, err := NewPlan(c, d.Cmd == "filtering")
		if err != nil {
			return err.Error() + "\n"
		}
		return p.String()
	})
}

// parseConfig reads lines "nic ID VLAN MAC-byte [address…]" and "uplink ID VLAN".
func parseConfig(text string) (c Config, err error) {
	for _, l := range strings.Split(strings.TrimSpace(text), "\n") {
		var id, last int
		var vlan uint16
		f := strings.Fields(l)
		switch f[0] {
		case "nic":
			if _, err := fmt.Sscan(strings.Join(f[1:4], " "), &id, &vlan, &last); err != nil {
				return c, err
			}
			n := NIC{ID: id, VLAN: vlan, MAC: MAC{2, 0, 0, 0, 0, byte(last)}}
			for _, a := range f[4:] {
				addr, err := netip.ParseAddr(a)
				if err != nil {
					return c, err
				}
				n.Addresses = append(n.Addresses, addr)
			}
			c.NICs = append(c.NICs, n)
		case "uplink":
			if _, err := fmt.Sscan(strings.Join(f[1:3], " "), &id, &vlan); err != nil {
				return c, err
			}
			c.Uplinks = append(c.Uplinks, Uplink{ID: id, VLAN: vlan})
		}
	}
	return c, nil
}

package network

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

// TestPlan: configurations and their plans, as text.
func TestPlan(t *testing.T) { plans(t, "testdata/plan") }

// TestQuarantinePlan: the same with a quarantine, and what is refused. After "moving=PORT" with a port cut off.
func TestQuarantinePlan(t *testing.T) { plans(t, "testdata/quarantine") }

func plans(t *testing.T, file string) {
	datadriven.RunTest(t, file, func(t *testing.T, d *datadriven.TestData) string {
		c, err := parseConfig(d.Input)
		if err != nil {
			d.Fatalf(t, "%v", err)
		}
		p, err := NewPlan(c, d.Cmd == "filtering")
		if err != nil {
			return err.Error() + "\n"
		}
		for _, moving := range d.CmdArgs {
			p.Chains = cut(p.Chains, moving.Vals)
		}
		return p.String()
	})
}

// parseConfig reads lines "nic ID VLAN MAC-byte [quarantined] [address…]", "uplink ID VLAN" and "quarantine VLAN [address…]".
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
			f = f[4:]
			if n.Quarantined = len(f) > 0 && f[0] == "quarantined"; n.Quarantined {
				f = f[1:]
			}
			if n.Addresses, err = parseAddresses(f); err != nil {
				return c, err
			}
			c.NICs = append(c.NICs, n)
		case "quarantine":
			if _, err := fmt.Sscan(f[1], &c.Quarantine.VLAN); err != nil {
				return c, err
			}
			if c.Quarantine.Remediation, err = parseAddresses(f[2:]); err != nil {
				return c, err
			}
		case "uplink":
			if _, err := fmt.Sscan(strings.Join(f[1:3], " "), &id, &vlan); err != nil {
				return c, err
			}
			c.Uplinks = append(c.Uplinks, Uplink{ID: id, VLAN: vlan})
		}
	}
	return c, nil
}

func parseAddresses(texts []string) (all []netip.Addr, err error) {
	for _, text := range texts {
		if text == "invalid" {
			all = append(all, netip.Addr{})
			continue
		}
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	return all, nil
}

// TestPlanCutOff: a NIC that is cut off is in no VLAN, whatever the quarantine is, and keeps nobody of its MAC out of that.
func TestPlanCutOff(t *testing.T) {
	c := Config{Quarantine: Quarantine{VLAN: 99, Remediation: []netip.Addr{ipB}}, NICs: []NIC{
		{ID: 1, VLAN: 5, MAC: macA, Quarantined: true, CutOff: true}, {ID: 2, VLAN: 6, MAC: macA, Quarantined: true},
	}}
	for _, filtering := range []bool{false, true} {
		p, err := NewPlan(c, filtering)
		if err != nil {
			t.Fatal(err)
		}
		if p.Ports[0].VLAN != 0 || p.Ports[1].VLAN != 99 {
			t.Errorf("%+v", p.Ports)
		}
		for _, chain := range p.Chains {
			if chain.Name == "rt1" && len(chain.Rules) != 1 {
				t.Errorf("it may say something: %v", chain.Rules)
			}
		}
	}
	c.NICs[0].Quarantined = false
	if _, err := NewPlan(c, true); err == nil {
		t.Error("cut off, and not quarantined")
	}
}

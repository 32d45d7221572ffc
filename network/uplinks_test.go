package network

import (
	"slices"
	"strings"
	"testing"
)

func TestParseUplinks(t *testing.T) {
	got, err := ParseUplinks("eth1:10,eth2,")
	if want := []HostLink{{Name: "eth1", VLAN: 10}, {ID: 1, Name: "eth2"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	got, err = ParseUplinks("acme=eth1:10,eth2:10,acme=eth3,default=a=b")
	if want := []HostLink{{0, "acme", "eth1", 10}, {1, "", "eth2", 10}, {2, "acme", "eth3", 0}, {3, "default", "a=b", 0}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := ParseUplinks(""); err != nil || got != nil {
		t.Errorf("%v, %v", got, err)
	}
	for text, want := range map[string]string{
		"eth1:0": "VLAN", "eth1:4095": "VLAN", "eth1:": "VLAN", ":5": "IFACE", "a name": "IFACE", "..": "IFACE",
		"sixteen-letters-": "IFACE", "a/b": "IFACE", "eth1,eth1:4": "twice", "acme=eth1,eth1": "twice", "=eth1": "tenant", "A=eth1": "tenant", "../x=eth1": "tenant", "acme=": "IFACE", strings.Join(strings.Split("abcdefghijklmnopq", ""), ","): "more than",
	} {
		if _, err := ParseUplinks(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestParseQuarantine: what a quarantine is, and what is none.
func TestParseQuarantine(t *testing.T) {
	q, err := ParseQuarantine("4000=192.0.2.1,2001:db8::1")
	if err != nil || q.VLAN != 4000 || len(q.Remediation) != 2 {
		t.Error(q, err)
	}
	if q, err := ParseQuarantine("12"); err != nil || q.VLAN != 12 || q.Remediation != nil {
		t.Error(q, err)
	}
	if q, err := ParseQuarantine(""); err != nil || q.VLAN != 0 {
		t.Error(q, err)
	}
	for _, bad := range []string{"0", "4095", "x", "5=", "5=x", "5=224.0.0.1", "5=192.0.2.1,192.0.2.1", "=192.0.2.1"} {
		if q, err := ParseQuarantine(bad); err == nil {
			t.Errorf("%q: %v", bad, q)
		}
	}
}

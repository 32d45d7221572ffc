package builder_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/builder"
)

func TestParseResets(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": 10 * time.Minute, "blkback=1s": time.Second, "blkback=off": 0, "blkback=1s,blkback=2s,": 2 * time.Second,
	} {
		got, err := builder.ParseResets(text)
		if err != nil || got[services.BlkBack] != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"blkback": "SERVICE=DURATION", "builder=1s": "SERVICE=DURATION", "blkback=often": "no duration", "blkback=1ms": "less than",
	} {
		if _, err := builder.ParseResets(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	got, err := builder.ParseResets("netback=30s")
	if err != nil || got[services.NetBack] != 30*time.Second || got[services.BlkBack] != 10*time.Minute {
		t.Errorf("%v, %v", got, err)
	}
}

func TestParseUplinks(t *testing.T) {
	got, err := builder.ParseUplinks("eth1:10,eth2,")
	if want := []builder.Uplink{{Name: "eth1", VLAN: 10}, {Name: "eth2"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := builder.ParseUplinks(""); err != nil || got != nil {
		t.Errorf("%v, %v", got, err)
	}
	for text, want := range map[string]string{
		"eth1:0": "VLAN", "eth1:4095": "VLAN", "eth1:": "VLAN", ":5": "IFACE", "a name": "IFACE", "..": "IFACE",
		"sixteen-letters-": "IFACE", "a/b": "IFACE", "eth1,eth1:4": "twice", strings.Join(strings.Split("abcdefghijklmnopq", ""), ","): "more than",
	} {
		if _, err := builder.ParseUplinks(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

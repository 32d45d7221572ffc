package services

import (
	"strings"
	"testing"
	"time"
)

func TestParseResets(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": 10 * time.Minute, "blkback=1s": time.Second, "blkback=off": 0, "blkback=1s,blkback=2s,": 2 * time.Second,
	} {
		got, err := ParseResets(text)
		if err != nil || got[BlkBack] != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"blkback": "SERVICE=DURATION", "emulator=1s": "SERVICE=DURATION", "builder=900ms": "less than", "blkback=often": "no duration", "blkback=1ms": "less than",
	} {
		if _, err := ParseResets(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	got, err := ParseResets("netback=30s")
	if err != nil || got[NetBack] != 30*time.Second || got[BlkBack] != 10*time.Minute {
		t.Errorf("%v, %v", got, err)
	}
}

func TestParseStoreReset(t *testing.T) {
	for in, want := range map[string]int{"1": 1, "50": 50, "off": -1} {
		if n, err := ParseStoreReset(in); n != want || err != nil {
			t.Errorf("%q: %d %v", in, n, err)
		}
	}
	for _, in := range []string{"", "0", "-1", "never", "1x", "99999999999999999999"} {
		if n, err := ParseStoreReset(in); err == nil {
			t.Errorf("%q: %d", in, n)
		}
	}
}

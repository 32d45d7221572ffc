package builder_test

import (
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
}

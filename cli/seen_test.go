package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
)

// TestSeen: when a listing was begun is guessed only where it comes through a pipe, and never too late.
func TestSeen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	if err := os.WriteFile(path, []byte("/\x00/etc\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		s     seen
		stdin string
		at    time.Time
		err   string
	}{
		{s: seen{}, at: time.Unix(0, 0)},
		{s: seen{file: "-"}, stdin: "/\n/etc\n", at: started.Add(-pipeMargin)},
		{s: seen{file: "-", at: "@12.25", of: "disk0p1"}, stdin: "/\n", at: time.Unix(12, 250e6)},
		{s: seen{file: path, at: "2026-01-02T03:04:05Z"}, at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)},
		{s: seen{file: path}, err: "give --seen-at"},
		{s: seen{file: path, at: "yesterday"}, err: "--seen-at"},
		{s: seen{file: path, at: "@-5"}, err: "--seen-at"},
		{s: seen{file: path, at: "@9999999999999"}, err: "--seen-at"},
		{s: seen{at: "@5"}, err: "give a listing"},
		{s: seen{file: "-"}, stdin: "/\n/etc", err: "cut off"},
	} {
		var r v1.ValidateRequest
		err := c.s.into(t.Context(), &r, strings.NewReader(c.stdin))
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%+v: %v, not %q", c.s, err, c.err)
			}
		case err != nil || !time.Unix(0, r.SeenAtNs).Equal(c.at) || r.SeenOf != c.s.of || (len(r.Seen) > 0) != (c.s.file != ""):
			t.Errorf("%+v: %v, begun at %v", c.s, err, time.Unix(0, r.SeenAtNs))
		}
	}
}

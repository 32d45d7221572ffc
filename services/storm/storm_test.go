package storm

import (
	"slices"
	"testing"
	"time"
)

func TestDeaths(t *testing.T) {
	begun := time.Unix(1000, 0)
	for name, c := range map[string]struct {
		at   []time.Duration
		want []bool
	}{
		"few":  {[]time.Duration{0, 1, 2}, []bool{false, false, false}},
		"many": {[]time.Duration{0, 1, 2, 3}, []bool{false, false, false, true}},
		"slow": {[]time.Duration{0, 4, 8, 12, 16, 17}, []bool{false, false, false, false, false, true}},
	} {
		var d Deaths
		var got []bool
		for _, at := range c.at {
			got = append(got, d.Add(begun.Add(at*time.Second), 3))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

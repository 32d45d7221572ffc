package services

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Resettable are the services whose processes are replaced under running guests.
var Resettable = []string{BlkBack, NetBack, Toolstack, VTPM, Builder}

// DefaultResets are in force for services that the operator does not name.
const DefaultResets = "blkback=10m,netback=10m,vtpm=10m"

// minReset is the most often that a service can be replaced, minBuilder the Builder, with which all are.
const (
	minReset   = 100 * time.Millisecond
	minBuilder = time.Second
)

// ParseResets reads a list such as "blkback=10s,netback=off" on top of the default.
func ParseResets(text string) (map[string]time.Duration, error) {
	out := map[string]time.Duration{}
	for item := range strings.SplitSeq(DefaultResets+","+text, ",") {
		if item == "" {
			continue
		}
		name, value, ok := strings.Cut(item, "=")
		if !ok || !slices.Contains(Resettable, name) {
			return nil, fmt.Errorf("%q is not SERVICE=DURATION; services: %s", item, strings.Join(Resettable, ", "))
		}
		if value == "off" {
			delete(out, name)
			continue
		}
		d, err := time.ParseDuration(value)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is no duration such as 10s, nor off", name, value)
		}
		least := minReset
		if name == Builder {
			least = minBuilder
		}
		if d < least {
			return nil, fmt.Errorf("%s: %v is less than %v", name, d, least)
		}
		out[name] = d
	}
	return out, nil
}

// DefaultStoreReset replaces the store's worker after each response, as the source of the
// partition does.
const DefaultStoreReset = "1"

// StoreResetUsage is the help of the flag that ParseStoreReset reads.
const StoreResetUsage = "responses after which the store's worker process is replaced: a number from 1 on, or off"

// ParseStoreReset reads after how many responses the store's worker is replaced: a number from 1
// on, or "off" for never, which is -1.
func ParseStoreReset(s string) (int, error) {
	if s == "off" {
		return -1, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q: after how many responses the store's worker is replaced: a number from 1 on, or off", s)
	}
	return n, nil
}

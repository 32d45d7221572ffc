package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/validation/crossview"
)

// A seen is what the flags say of a listing that was made inside a guest.
type seen struct{ file, at, of string }

// pipeMargin is how far the guest's clock may be behind, where the time is this command's: what was changed so shortly before is
// not called hidden.
const pipeMargin = time.Minute

// started is when this command was.
var started = time.Now()

// into reads the listing, until ctx ends, and puts it into a request.
func (s seen) into(ctx context.Context, r *v1.ValidateRequest, stdin io.Reader) error {
	if s.file == "" {
		if s.at != "" || s.of != "" {
			return usagef("--seen-at and --seen-of say something of --seen: give a listing")
		}
		return nil
	}
	from := stdin
	if s.file != "-" {
		f, err := os.Open(s.file)
		if err != nil {
			return err
		}
		defer f.Close()
		from = f
	}
	at := started.Add(-pipeMargin)
	switch f, ok := from.(*os.File); {
	case s.at != "":
		var err error
		if at, err = parseTime(s.at); err != nil {
			return usagef("--seen-at: %v", err)
		}
	case ok && regular(f):
		return usagef("--seen: nobody knows when the listing in a file was begun: give --seen-at, by the guest's clock (`date +@%%s` in it, before)")
	}
	b, err := io.ReadAll(io.LimitReader(input{ctx, from}, crossview.MaxListing+1))
	if err == nil {
		_, err = crossview.Parse(b)
	}
	if err != nil {
		return fmt.Errorf("--seen %s: %w", s.file, err)
	}
	r.Seen, r.SeenAtNs, r.SeenOf = b, at.UnixNano(), s.of
	return nil
}

func regular(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode().IsRegular()
}

// parseTime reads RFC 3339, or @SECONDS as date(1) has it, with a fraction or without.
func parseTime(s string) (time.Time, error) {
	text, ok := strings.CutPrefix(s, "@")
	if !ok {
		return time.Parse(time.RFC3339, s)
	}
	whole, fraction, _ := strings.Cut(text, ".")
	seconds, err := strconv.ParseInt(whole, 10, 33)
	var nanos uint64
	if err == nil && fraction != "" {
		nanos, err = strconv.ParseUint((fraction + "000000000")[:9], 10, 32)
	}
	if err != nil || seconds <= 0 {
		return time.Time{}, fmt.Errorf("%q: use RFC 3339, or @SECONDS since 1970", s)
	}
	return time.Unix(seconds, int64(nanos)), nil
}

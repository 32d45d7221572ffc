package state_test

func child() {}
